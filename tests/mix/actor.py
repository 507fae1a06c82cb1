"""Does the actions of a plan, one method per kind, and hands what comes back to the tally."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from tests.mix.oracle import MixTally
from tests.mix.plan import Action
from tests.soak.tally import Ask
from tests.soak.traffic import Client, events

SILENCE = 120  # seconds without a byte: then a request is lost
VOTED_FATES = ("finished", "pruned", "aborted", "cancelled")


class Actor(Client):
    """Does one action."""

    def __init__(
        self, url: str, tally: MixTally, seed: int, action: Action, models: Sequence[Path]
    ):
        super().__init__(url, tally, f"a{action.number}", seed)
        self._mix, self._action, self._models = tally, action, models

    def act(self) -> None:
        """Do it, and wait for its end."""
        getattr(self, f"do_{self._action.kind}")(**self._action.args)

    # Requests of one kind each.

    def do_ordinary(self, prompt: int, tokens: int, form: str, **more: Any) -> None:
        self._send(self._new("ordinary", None, 1, prompt, tokens, body=more), form)

    def do_group(
        self, name: str, n: int, prompt: int, tokens: int, form: str, step: dict, **more: Any
    ) -> None:
        self._send(self._new("group", name, n, prompt, tokens, step=step, body=more), form)

    def do_join(self, **args: Any) -> None:
        self.do_group(**args)

    def do_long(self, name: str, n: int, prompt: int, tokens: int, step: dict, **more: Any) -> None:
        group = name if n > 1 else None
        ask = self._new("long", group, n, prompt, tokens, step=step, body=more)
        self._send(ask, "generate")

    def do_malformed(self, step: Any) -> None:
        params = {"n": 4, "max_new_tokens": 4, "custom_params": {"step": step}}
        ask = self._new("malformed", None, 4, 20, 4)
        with self._tally.asking(ask):
            answer = self._post("/generate", {"text": "So", "sampling_params": params})
            if answer.status_code != 400 or "custom_params.step" not in answer.text:
                self._tally.problem(ask, f"lost: {answer.status_code} {answer.text[:300]}")

    def do_same_rid(self, tokens: int, traces: int | None) -> None:
        """Two live requests of one id: each is answered or refused."""
        step = {} if traces is None else {"traces": traces}
        asks = [
            self._new("same rid", None, 1, 20, tokens, may_abort=True, step=step) for _ in range(2)
        ]
        rid, group = f"twin-{self._name}", f"g{self._action.number}"
        self._mix.left.add(group)

        def send(ask: Ask) -> None:
            with self._tally.asking(ask):
                body = {
                    **self._body(ask, stream=False),
                    "rid": rid,
                }
                if traces is not None:
                    body["sampling_params"].update(
                        temperature=1.0,
                        custom_params={"step": {"traces": traces, "group": group}},
                    )
                answer = self._post("/generate", body)
                refused = answer.status_code == 400 and "uplicate" in answer.text
                if answer.status_code != 200 and not refused and not self._mix.aborts:
                    self._tally.problems.append(f"{ask}: {answer.status_code} {answer.text[:300]}")

        self._together(*(lambda ask=ask: send(ask) for ask in asks))

    # Votes.

    def do_vote(
        self,
        name: str,
        prompt: int,
        tokens: int,
        form: str,
        step: dict,
        regex: str | None,
        abort: float | None,
        **more: Any,
    ) -> None:
        ask = self._new(
            "vote", name, step["traces"], prompt, tokens, step=step, may_abort=abort is not None
        )
        self._mix.left.add(name)  # its traces' own ids never come back
        with self._tally.asking(ask):
            if abort is not None:
                self._mix.aborted.add(name)
                self._later(abort, ask, "/step/abort_group", {"group": name})
            info = self._voted(ask, form, regex, more)
            if info is not None:
                self._check_vote(ask, info)

    def do_tower(self, **args: Any) -> None:
        self.do_vote(**args)

    def _voted(
        self, ask: Ask, form: str, regex: str | None, more: dict[str, Any]
    ) -> dict[str, Any] | None:
        custom = {"custom_params": {"step": {"group": ask.group, **ask.step}}}
        grammar = {} if regex is None else {"regex": regex}
        if form == "chat":
            body = {
                "model": "default",
                "messages": [{"role": "user", "content": "1 + 1?"}],
                "temperature": 1.0,
                "max_tokens": ask.new_tokens,
                "return_meta_info": True,
                **custom, **grammar, **more,
            }  # fmt: skip
            with self._post("/v1/chat/completions", body) as answer:
                answer.raise_for_status()
                (choice,) = answer.json()["choices"]
            return dict(choice["meta_info"])
        params = {"temperature": 1.0, "max_new_tokens": ask.new_tokens, **custom, **grammar}
        body = {
            "input_ids": self._prompt(ask.prompt_tokens),
            "sampling_params": params,
            "rid": self._rid(),
            "stream": form == "stream",
            **more,
        }
        with self._post("/generate", body) as answer:
            answer.raise_for_status()
            infos = (
                self._streamed(ask, events(answer.iter_lines()))
                if form == "stream"
                else [answer.json()["meta_info"]]
            )
        if len(infos) != 1 or infos[0]["id"] != self._rid():
            self._tally.problem(ask, f"{len(infos)} answers, of {[i['id'] for i in infos]}")
        return infos[0] if infos else None

    def _check_vote(self, ask: Ask, info: dict[str, Any]) -> None:
        vote = info["step"]["vote"]
        fates = {fate: vote[fate] for fate in VOTED_FATES}
        if vote["traces"] != ask.traces or sum(fates.values()) != ask.traces:
            self._tally.problem(ask, f"its {ask.traces} traces ended as {fates}")
        if not self._mix.touched(ask) and (fates["aborted"] or not info["completion_tokens"]):
            self._tally.problem(ask, f"the vote is {vote}")
        self._mix.count_group(ask, fates["finished"] + fates["cancelled"], fates["pruned"])
        self._tally.counts["voted"] += 1

    # Named traces and sessions.

    def do_named(
        self, name: str, mates: int, prompt: int, tokens: int, wait: str, **more: Any
    ) -> None:
        ids = self._prompt(prompt)
        first, second = (
            self._new("named", name, 1, prompt, tokens, step={"trace": "t"}, body=more)
            for _ in range(2)
        )
        infos: dict[int, dict[str, Any]] = {}

        def part(number: int, ask: Ask, ids: list[int]) -> list[int]:
            with self._tally.asking(ask):
                body = {**self._body(ask, stream=False), "input_ids": ids}
                body["rid"] = f"{body['rid']}-{number}"
                with self._post("/generate", body) as answer:
                    answer.raise_for_status()
                    said = answer.json()
                infos[number] = said["meta_info"]
                self._tally.answers(ask, [said["meta_info"]])
                return list(said["output_ids"])
            return []

        def both() -> None:
            if wait == "until it ended":
                part(2, second, ids + part(1, first, ids))
                self._check_continued(second, infos)
                return
            pause = 0.3 if wait == "a moment" else 0
            self._together(
                lambda: part(1, first, ids), lambda: (time.sleep(pause), part(2, second, ids))
            )

        others = self._new("group", name, mates, prompt, tokens, body=more)
        self._together(both, lambda: self._send(others, "generate"))

    def _check_continued(self, ask: Ask, infos: dict[int, dict[str, Any]]) -> None:
        steps = [infos[i]["step"]["num_steps"] for i in (1, 2) if i in infos and "step" in infos[i]]
        if steps != sorted(steps):
            self._tally.problem(ask, f"its steps went from {steps[0]} to {steps[1]}")

    def do_session(self, name: str, sessions: int, turns: int, tokens: int, close: str) -> None:
        self._together(
            *(
                lambda i=i: self._converse(name, f"{name}-{i}", turns, tokens, close)
                for i in range(sessions)
            )
        )

    def _converse(self, group: str, session: str, turns: int, tokens: int, close: str) -> None:
        opened = {"session_id": session, "capacity_of_str_len": 4096}
        if self._post("/open_session", opened).status_code != 200:
            self._tally.problems.append(f"session {session} was not opened")
        last: str | None = None
        for turn in range(turns):
            closing = turn == turns - 1 and close == "in the last turn"
            ask = self._new("turn", group, 1, 20, tokens, may_abort=closing)
            with self._tally.asking(ask):
                body = self._body(ask, stream=False)
                body["rid"] = f"{session}-turn{turn}"
                body["session_params"] = {"id": session, "rid": last}
                last = body["rid"]
                if closing:
                    self._later(0.1, ask, "/close_session", {"session_id": session})
                with self._post("/generate", body) as answer:
                    answer.raise_for_status()
                    self._tally.answers(ask, [answer.json()["meta_info"]])
            if self._mix.touched(ask):
                break  # a turn that was aborted cannot be continued
        self._post("/close_session", {"session_id": session})

    # Clients that go away, or hardly read; aborts of one request or group.

    def do_leave(self, stream: bool, patience: float, **args: Any) -> None:
        ask = self._may_abort("left", **args)
        if ask.group is not None:
            self._mix.left.add(ask.group)
        self._leave(ask, stream, patience)

    def do_abort(self, stream: bool, patience: float, **args: Any) -> None:
        ask = self._may_abort("aborted", **args)
        with self._tally.asking(ask):
            if ask.group is None:
                self._later(patience, ask, "/abort_request", {"rid": self._rid()})
            else:
                self._mix.aborted.add(ask.group)
                self._later(patience, ask, "/step/abort_group", {"group": ask.group})
            self._generate(ask, stream=stream)

    def _may_abort(
        self, kind: str, *, name: str, n: int, prompt: int, tokens: int, **more: Any
    ) -> Ask:
        group = name if n > 1 else None
        return self._new(kind, group, n, prompt, tokens, may_abort=True, body=more)

    def do_slow_reader(
        self, name: str, n: int, prompt: int, tokens: int, bytes: int, leaves: bool
    ) -> None:
        """Reads a byte a second, and then the rest or nothing more."""
        ask = self._new("slow reader", name, n, prompt, tokens, may_abort=leaves)
        if leaves:
            self._mix.left.add(name)
        with self._tally.asking(ask):
            lines = self._read_slowly(self._body(ask, stream=True), bytes, leaves)
            if not leaves:
                self._tally.answers(ask, self._streamed(ask, events(lines)))

    def _read_slowly(self, body: dict[str, Any], bytes: int, leaves: bool) -> Iterator[bytes]:
        request = requests.Request("POST", f"{self._url}/generate", json=body).prepare()
        address = urlsplit(self._url)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.settimeout(SILENCE)
            connection.connect((address.hostname, address.port))
            # Version 1.0: the answer ends with the connection, and has no chunks to undo.
            head = f"POST /generate HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(request.body)}\r\n\r\n"  # noqa: E501
            connection.sendall(head.encode() + request.body)
            said = b""
            for _ in range(bytes):
                said += connection.recv(1)
                time.sleep(1)
            while not leaves and (more := connection.recv(65536)):
                said += more
        return iter(said.split(b"\n"))

    # The whole server.

    def do_abort_all(self) -> None:
        with self._mix.everything_aborted():
            self._control("/abort_request", {"abort_all": True})

    def do_flush(self) -> None:
        self._control("/flush_cache", {}, 200, 400)  # it is refused while requests run

    def do_pause(self, mode: str, seconds: float) -> None:
        if mode == "abort":
            with self._mix.everything_aborted(), self._paused(mode):
                time.sleep(seconds)
        else:
            with self._paused(mode):
                time.sleep(seconds)

    def do_update(self, model: int, pause: str | None, flush: bool) -> None:
        body = {"model_path": str(self._models[model]), "flush_cache": flush}
        if pause is None:
            self._control("/update_weights_from_disk", body, 200, 400)
        else:
            with self._paused(pause):
                self._control("/update_weights_from_disk", body, 200, 400)

    @contextmanager
    def _paused(self, mode: str) -> Iterator[None]:
        try:
            self._control("/pause_generation", {"mode": mode})
            yield
        finally:
            self._control("/continue_generation", {})

    def _control(self, path: str, body: Any, *fine: int) -> None:
        answer = requests.post(f"{self._url}{path}", json=body, timeout=SILENCE)
        self._tally.counts[f"{path} {answer.status_code}"] += 1
        if answer.status_code not in (fine or (200,)):
            self._tally.problems.append(f"{path} {body}: {answer.status_code} {answer.text[:200]}")

    # Parts of actions.

    def _new(
        self, kind: str, group: str | None, traces: int, prompt: int, tokens: int, **more: Any
    ) -> Ask:
        self._count += 1
        return Ask(kind, traces, prompt, tokens, group, joins=group is not None, **more)

    def _send(self, ask: Ask, form: str) -> None:
        with self._tally.asking(ask):
            if form == "chat":
                self._chat(ask)
            elif form == "members":
                self._members(ask)
            else:
                self._generate(ask, stream=form == "stream")

    def _post(self, path: str, body: Any, timeout: float = SILENCE) -> requests.Response:
        return super()._post(path, body, timeout)

    def _later(self, seconds: float, ask: Ask, path: str, body: Any) -> None:
        timer = threading.Timer(seconds, self._end, (ask, path, body))
        timer.daemon = True
        timer.start()

    @staticmethod
    def _together(*parts: Callable[[], Any]) -> None:
        with ThreadPoolExecutor(len(parts)) as threads:
            for future in [threads.submit(part) for part in parts]:
                future.result()
