"""Mixed traffic in a closed loop: each kind of client sends its next request after its last."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import requests

from tests.soak.tally import Ask, Tally

TIMEOUT = 600  # seconds without a byte: then the request is lost
ENOUGH = 1000  # problems: the server is dead, or fails everything
GROUP_SIZES = (4, 8, 16, 32, 64)
TOKENS = range(40, 260)  # ids of ordinary text in the tests' tokenizer


class Client:
    """One thread's traffic, drawn from its own seed."""

    def __init__(self, url: str, tally: Tally, name: str, seed: int) -> None:
        self._url, self._tally, self._name = url, tally, name
        self._draw = random.Random(f"{name} {seed}")
        self._count = 0

    def run(self, kind: Callable[[Client], None], until: float) -> None:
        """Send until a moment of the monotonic clock; what was begun is waited for."""
        while time.monotonic() < until and len(self._tally.problems) < ENOUGH:
            kind(self)

    # The kinds of traffic.

    def group(self) -> None:
        """A group in one of the forms in which it can be asked for."""
        n = self._draw.choice(GROUP_SIZES)
        form = self._draw.choice(("generate", "chat", "members", "stream"))
        if form == "stream":
            n = min(n, 16)  # each chunk repeats the text, and the client shares the machine
        ask = self._ask("group", n, self._draw.randint(10, 60), self._draw.randint(30, 200))
        with self._tally.asking(ask):
            if form == "chat":
                self._chat(ask)
            elif form == "members":
                self._members(ask)
            else:
                self._generate(ask, stream=form == "stream")

    def ordinary(self) -> None:
        """A request that is never scored or pruned."""
        time.sleep(self._draw.uniform(0, 0.5))
        ask = self._ask("ordinary", 1, self._draw.randint(10, 120), self._draw.randint(8, 64))
        with self._tally.asking(ask):
            self._generate(ask, stream=self._draw.random() < 0.4)

    def long(self) -> None:
        """A prompt of several chunks, of a group or of an ordinary request."""
        n = self._draw.choice((1, 4, 8))
        ask = self._ask("long", n, self._draw.randint(600, 1200), self._draw.randint(10, 80))
        with self._tally.asking(ask):
            self._generate(ask, stream=self._draw.random() < 0.3)

    def abort(self) -> None:
        """A request that is aborted at some moment, by its id or its group's."""
        n = self._draw.choice((1, 4, 16, 32))
        ask = self._ask("aborted", n, 40, 300, may_abort=True)
        path, body = "/abort_request", {"rid": self._rid()}
        if ask.group is not None and self._tally.step:
            path, body = "/step/abort_group", {"group": ask.group}
        elif n > 1:
            return  # a stock server knows the samples' own ids alone
        timer = threading.Timer(self._draw.uniform(0, 3), self._end, (ask, path, body))
        timer.daemon = True
        with self._tally.asking(ask):
            timer.start()
            self._generate(ask, stream=self._draw.random() < 0.5)
        timer.join()

    def leave(self) -> None:
        """A client that goes away in the middle of its answer, or before it."""
        ask = self._ask("left", self._draw.choice((1, 4, 16, 64)), 40, 400, may_abort=True)
        stream = self._draw.random() < 0.5
        if ask.group is not None:
            self._tally.left.add(ask.group)
        self._leave(ask, stream, self._draw.uniform(0.1, 3))

    def _leave(self, ask: Ask, stream: bool, patience: float) -> None:
        with self._tally.asking(ask):
            try:
                # `timeout` bounds the silence, so a stream is left by the clock instead.
                with self._post("/generate", self._body(ask, stream), patience) as answer:
                    until = time.monotonic() + patience
                    for _ in answer.iter_lines():
                        if time.monotonic() > until:
                            break
            except (requests.Timeout, requests.ConnectionError):
                pass  # so it was meant

    # Requests.

    def _ask(self, kind: str, traces: int, prompt: int, new: int, **more: Any) -> Ask:
        self._count += 1
        group = f"{self._name}-{self._count}" if traces > 1 else None
        may_stop = self._draw.random() < 0.3
        return Ask(kind, traces, prompt, new, group, may_stop=may_stop, **more)

    def _rid(self) -> str:
        return f"rid-{self._name}-{self._count}"

    def _prompt(self, tokens: int) -> list[int]:
        return self._draw.choices(TOKENS, k=tokens)

    def _custom(self, ask: Ask) -> dict[str, Any]:
        step: Any = False
        if ask.group is not None:
            step = {"group": ask.group, "step_scores": True, **ask.step}
        return {"custom_params": {"step": step}} if self._tally.step else {}

    def _body(self, ask: Ask, stream: bool, traces: int | None = None) -> dict[str, Any]:
        params = {
            "n": traces or ask.traces,
            "temperature": 0 if ask.group is None else 1.0,
            "max_new_tokens": ask.new_tokens,
            "ignore_eos": not ask.may_stop,
            **self._custom(ask),
        }
        prompt = self._prompt(ask.prompt_tokens)
        body = {"input_ids": prompt, "sampling_params": params, "stream": stream, **ask.body}
        return {**body, "rid": self._rid()} if params["n"] == 1 and traces is None else body

    def _end(self, ask: Ask, path: str, body: Any) -> None:
        try:
            with self._post(path, body) as answer:
                if answer.status_code != 200:
                    self._tally.problem(ask, f"its abort was answered with {answer.status_code}")
        except requests.RequestException as error:
            self._tally.problem(ask, f"its abort was not answered: {error}"[:300])

    def _post(self, path: str, body: Any, timeout: float = TIMEOUT) -> requests.Response:
        return requests.post(f"{self._url}{path}", json=body, timeout=timeout, stream=True)

    def _generate(self, ask: Ask, *, stream: bool) -> None:
        with self._post("/generate", self._body(ask, stream)) as answer:
            answer.raise_for_status()
            if stream:
                infos = self._streamed(ask, events(answer.iter_lines()))
            else:
                body = answer.json()
                infos = [each["meta_info"] for each in (body if isinstance(body, list) else [body])]
        if ask.group is None and infos and infos[0]["id"] != self._rid():
            self._tally.problem(ask, f"the answer is that of {infos[0]['id']}")
        self._tally.answers(ask, infos)

    def _streamed(self, ask: Ask, events: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        """The last ``meta_info`` of every trace; none may speak again after its end."""
        ended: dict[int, dict[str, Any]] = {}
        for event in events:
            index = event.get("index", 0)
            if "meta_info" not in event:
                self._tally.problem(ask, f"an error in the stream: {str(event)[:300]}")
            elif index in ended:
                self._tally.problem(ask, f"trace {index} goes on after its end")
            elif event["meta_info"]["finish_reason"] is not None:
                ended[index] = event["meta_info"]
        return list(ended.values())

    def _members(self, ask: Ask) -> None:
        """The group as requests of their own, in one batch."""
        one = self._body(ask, stream=False, traces=1)
        body = {**one, "input_ids": [one["input_ids"]] * ask.traces}
        with self._post("/generate", body) as answer:
            answer.raise_for_status()
            self._tally.answers(ask, [each["meta_info"] for each in answer.json()])

    def _chat(self, ask: Ask) -> None:
        text = "".join(self._draw.choices("0123456789 +-*/=", k=ask.prompt_tokens))
        body = {
            "model": "default",
            "messages": [{"role": "user", "content": text}],
            "n": ask.traces,
            "temperature": 1.0,
            "max_tokens": ask.new_tokens,
            "ignore_eos": not ask.may_stop,
            "return_meta_info": True,
            **self._custom(ask),
            **ask.body,
        }
        with self._post("/v1/chat/completions", body) as answer:
            answer.raise_for_status()
            choices = answer.json()["choices"]
        if sorted(choice["index"] for choice in choices) != list(range(ask.traces)):
            self._tally.problem(ask, f"{len(choices)} choices came back")
        self._tally.answers(ask, [choice["meta_info"] for choice in choices])


def events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON of each event of a stream, which must end with its end mark."""
    done = False
    for line in lines:
        if line == b"data: [DONE]":
            done = True
        elif line.startswith(b"data: "):
            yield json.loads(line[6:])
    if not done:
        raise requests.ConnectionError("the stream ended early")


# How many clients of each kind, and the pool: about a quarter of what they ask for at once.
CLIENTS: tuple[tuple[Callable[[Client], None], int], ...] = (
    (Client.group, 4),
    (Client.ordinary, 3),
    (Client.long, 1),
    (Client.abort, 1),
    (Client.leave, 1),
)
