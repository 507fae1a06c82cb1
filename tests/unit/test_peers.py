"""Tokenizer workers that ask each other; here as tasks of one event loop, over real sockets."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from step_sglang.patches import peers
from step_sglang.patches.peers import Peers


async def worker(folder: Path, name: str, answer: Callable[[Any], Any]) -> Peers:
    async def answers(question: Mapping[str, Any]) -> Any:
        return answer(question)

    made = Peers(folder, answers)
    made._own = folder / f"{name}.sock"  # they are one process here
    await made.listen()
    return made


def test_all_others_answer(tmp_path: Path) -> None:
    async def run() -> None:
        asked: list[Any] = []

        def of(name: str) -> Callable[[Any], Any]:
            def answer(question: Any) -> Any:
                asked.append((name, question))
                return [name, question["what"]]

            return answer

        one, *_ = [await worker(tmp_path, name, of(name)) for name in ("one", "two", "three")]
        assert sorted(await one.ask({"what": "ü\n"})) == [["three", "ü\n"], ["two", "ü\n"]]
        big = "x" * 3_000_000
        assert [len(said) for _, said in await one.ask({"what": big})] == [len(big)] * 2
        assert {name for name, _ in asked} == {"two", "three"}

    asyncio.run(run())


def test_an_answer_may_be_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        one = await worker(tmp_path, "one", lambda question: None)
        await worker(tmp_path, "two", lambda question: None)
        assert await one.ask({}) == [None]

    asyncio.run(run())


def test_who_has_ended_or_fails_is_left_out(tmp_path: Path) -> None:
    async def run() -> None:
        def fail(question: Any) -> Any:
            raise ValueError("no")

        one = await worker(tmp_path, "one", lambda question: 1)
        gone = await worker(tmp_path, "gone", lambda question: 2)
        gone._server.close()
        await worker(tmp_path, "fails", fail)
        (tmp_path / "stale.sock").touch()
        assert await one.ask({}) == []

    asyncio.run(run())


def test_who_does_not_answer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_PATIENCE", 0.2)

    async def run() -> None:
        async def never(question: Mapping[str, Any]) -> Any:
            await asyncio.sleep(60)

        one = await worker(tmp_path, "one", lambda question: 1)
        slow = Peers(tmp_path, never)
        slow._own = tmp_path / "slow.sock"
        await slow.listen()
        with pytest.raises(TimeoutError):
            await one.ask({})
        one.tell({"what": 1})  # logs it
        await asyncio.gather(*one._tasks)

    asyncio.run(run())


def test_one_worker_has_nobody_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_peers", None)
    assert not peers.several()
    peers.tell_others({"what": 1})
    assert asyncio.run(peers.ask_others({"what": 1})) == []

    async def answer(question: Mapping[str, Any]) -> Any:
        return None

    async def run() -> None:
        await peers.join(tmp_path, answer)
        assert peers.several() and (tmp_path / f"{os.getpid()}.sock").exists()
        assert await peers.ask_others({"what": 1}) == []  # but itself

    asyncio.run(run())
