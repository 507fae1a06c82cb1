"""SGLang's frontend on a server with STEP: the forks of one ``fork(n)`` are one group.

A program needs no change. A fork knows at which position of its text it began, and shares its
program's arguments with its siblings; together they tell which forks belong together.
"""

from __future__ import annotations

import copy
import hashlib
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from threading import Lock
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.chat_template import ChatTemplate
from sglang.utils import http_request

from step_sglang import protocol

_MAX_PROGRAMS = 4096  # that are told apart at a time
_ENDED = "step_ended"  # on a fork's executor: the information of its last gen


class StepEndpoint(RuntimeEndpoint):  # type: ignore[misc]
    """``RuntimeEndpoint`` that groups forks; everything else is unchanged.

    Forks of one program that continue the same text from the same place are one group. A fork that
    fails or is pruned ends by itself: its later ``gen`` calls return an empty text at once, its
    ``error()`` says why, and its siblings go on.
    """

    chat_template: Any  # SGLang's ChatTemplate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.chat_template.name == "default" and not kwargs.get("chat_template_name"):
            # SGLang knows no template for this model by its name: the server knows its own.
            served = _served_template(self)
            if served is not None:
                self.chat_template = served
        # A program's arguments -> its name. They are kept, so that their id stays theirs.
        self._programs: OrderedDict[int, tuple[Any, str]] = OrderedDict()
        self._lock = Lock()

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
        """One ``gen``; of a fork as the group's trace that is this fork."""
        if s.fork_start_text_pos is None:
            text, info = super().generate(s, sampling_params)
            return text, info
        if hasattr(s, _ENDED):
            return "", getattr(s, _ENDED)
        try:
            text, info = super().generate(s, self._as_trace(s, sampling_params))
        except Exception as error:
            return "", _fail(s, error)
        _note(s, info)
        return text, info

    def generate_stream(self, s: Any, sampling_params: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """The same, streaming."""
        if s.fork_start_text_pos is None:
            yield from super().generate_stream(s, sampling_params)
            return
        if hasattr(s, _ENDED):
            yield "", getattr(s, _ENDED)
            return
        try:
            for text, info in super().generate_stream(s, self._as_trace(s, sampling_params)):
                yield text, info
                _note(s, info)
        except Exception as error:
            yield "", _fail(s, error)

    def _as_trace(self, s: Any, params: Any) -> Any:
        """The parameters, naming group and trace; the endpoint asks them what to send."""
        named = copy.copy(params)
        step = {protocol.GROUP: self._group(s), protocol.TRACE: s.sid}

        def to_srt_kwargs() -> dict[str, Any]:
            kwargs = type(named).to_srt_kwargs(named)
            return {**kwargs, "custom_params": {protocol.REQUEST_KEY: step}}

        named.to_srt_kwargs = to_srt_kwargs
        return named

    def _group(self, s: Any) -> str:
        with self._lock:
            _, program = self._programs.setdefault(id(s.arguments), (s.arguments, uuid.uuid4().hex))
            self._programs.move_to_end(id(s.arguments))
            if len(self._programs) > _MAX_PROGRAMS:
                self._programs.popitem(last=False)
        origin = hashlib.sha256(s.text_[: s.fork_start_text_pos].encode()).hexdigest()
        return f"{program}-{origin[:16]}"


def _served_template(endpoint: RuntimeEndpoint) -> ChatTemplate | None:
    """The prefixes and suffixes of user and assistant in the served model's own chat template.

    Read off a rendered chat of three marked turns; None where the template refuses such a chat or
    changes its texts.
    """
    user, reply, again = "step-user-1", "step-reply", "step-user-2"
    chat = [
        {"role": role, "content": text}
        for role, text in (("user", user), ("assistant", reply), ("user", again))
    ]
    try:
        tokens = _post(endpoint, "/v1/tokenize", messages=chat, add_special_tokens=False)["tokens"]
        text = _post(endpoint, "/v1/detokenize", tokens=tokens, skip_special_tokens=False)["text"]
        before, rest = text.split(user)
        to_reply, rest = rest.split(reply)
        between, to_generation = rest.split(again)
    except (AssertionError, KeyError, ValueError, OSError):
        return None
    if not between.endswith(before):  # an extra begin-of-text before the first turn, for one
        return None
    # What opens a reply to be generated may say more than what opened an earlier one (`<think>`).
    if not to_generation.startswith(to_reply):
        return None
    return ChatTemplate(
        name="served",
        default_system_prompt=None,
        role_prefix_and_suffix={
            "system": ("", "\n"),
            "user": (before, ""),
            "assistant": (to_generation, between.removesuffix(before)),
        },
    )


def _post(endpoint: RuntimeEndpoint, path: str, **body: Any) -> Any:
    answer = http_request(
        endpoint.base_url + path, json=body, api_key=endpoint.api_key, verify=endpoint.verify
    )
    endpoint._assert_success(answer)
    return answer.json()


def _note(s: Any, info: dict[str, Any]) -> None:
    """Remember that a fork was pruned or aborted."""
    reason = info.get("finish_reason") or {}
    pruned = (info.get(protocol.META_KEY) or {}).get(protocol.META_PRUNED)
    if pruned or reason.get("type") == "abort":
        setattr(s, _ENDED, info)
        s.error_ = RuntimeError(reason.get("message", "aborted"))


def _fail(s: Any, error: Exception) -> dict[str, Any]:
    # Raised, it would end the fork's thread, and whoever waits for the fork would wait forever.
    warnings.warn(f"a fork failed: {error}", stacklevel=2)
    s.error_ = error
    message = f"{type(error).__name__}: {error}"
    info = {"finish_reason": {"type": "abort", "message": message}}
    setattr(s, _ENDED, info)
    return info
