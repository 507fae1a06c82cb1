"""The servers that methods need: started here one after the other, or the user's, checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from step_sglang.client.http import server_info, server_url
from step_sglang.client.launch import running_server
from step_sglang.errors import ServerError
from step_sglang.evaluation.errors import BenchError

_RESERVED = 5  # tokens that SGLang subtracts from the longest request for the longest prompt


@dataclass(frozen=True)
class PoolSize:
    """The size of a server's KV pool: in tokens, as a share of memory, or SGLang's own choice."""

    tokens: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise BenchError(f"a KV pool has at least one token, not {self.tokens}")
        if self.share is not None and not 0 < self.share < 1:
            raise BenchError(f"--mem-fraction must be between 0 and 1, not {self.share}")

    @property
    def name(self) -> str:
        """As it stands in results and tables."""
        if self.tokens is not None:
            return f"{self.tokens} tokens"
        return "as served" if self.share is None else f"{self.share:g} of memory"

    @property
    def flags(self) -> tuple[str, ...]:
        """The server's flags for it."""
        if self.tokens is not None:
            return ("--max-total-tokens", str(self.tokens))
        return () if self.share is None else ("--mem-fraction-static", f"{self.share:g}")


@dataclass(frozen=True)
class Serving:
    """A kind of server. ``policy`` None: without STEP."""

    policy: str | None
    memory: PoolSize


@dataclass(frozen=True)
class Model:
    """What is served."""

    path: str
    scorer: str | None
    flags: tuple[str, ...] = ()  # the user's; the last, so that they win


@dataclass(frozen=True)
class ServerHandle:
    """A running server that was checked."""

    url: str
    pool: int  # KV tokens
    policy: str | None  # None: it runs without STEP
    longest: int  # tokens that one request may have, prompt included


@contextmanager
def served(serving: Serving, model: Model, running: int, log: Path) -> Iterator[ServerHandle]:
    """Start a server of that kind; stop it at the end.

    Args:
        serving: the kind of server.
        model: what it serves.
        running: requests that may run at the same time.
        log: file that its output is added to.

    Raises:
        BenchError: STEP is needed and there is no scorer.
        ServerError: it does not start.
    """
    flags = ["--enable-metrics", "--decode-log-interval", "10"]
    flags += ["--max-running-requests", str(running)]
    if serving.policy is not None:
        if model.scorer is None:
            raise BenchError(
                "these methods need STEP, and STEP needs --scorer, the model's scorer, or "
                "--scorer none; only cot and sc do without"
            )
        flags += ["--enable-step", "--step-scorer", model.scorer]
        flags += ["--step-policy", serving.policy]
    with running_server(model.path, [*flags, *serving.memory.flags, *model.flags], log) as url:
        yield probe_server(url, serving.policy)


def probe_server(url: str, policy: str | None) -> ServerHandle:
    """Check that a running server fits.

    Raises:
        BenchError: it runs without STEP, with another policy, or collects training data.
        ServerError: it does not answer, or is no SGLang server of this version.
    """
    info = server_info(url)
    try:
        state = info["internal_states"][0]
        step = state.get("step")
        pool = int(info["max_total_num_tokens"])
        longest = int(info["max_req_input_len"]) + _RESERVED
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ServerError(f"{url} is no SGLang server of this version") from error
    if policy is not None and step is None:
        raise BenchError(
            f"the server at {url} runs without STEP: start it with --enable-step --step-scorer S, "
            "or ask for cot and sc alone"
        )
    if policy is not None and step["policy"] != policy:
        raise BenchError(
            f"the server at {url} runs with --step-policy {step['policy']}, and these methods need "
            f"{policy}: start another, or leave --url out"
        )
    if step is not None and step["capture"]:
        raise BenchError(f"the server at {url} collects training data (--step-capture)")
    name = None if step is None else step["policy"]
    return ServerHandle(server_url(url), pool, name, longest)


def parse_pool_sizes(pool: str | None, share: str | None) -> tuple[PoolSize, ...]:
    """Pool sizes from comma-separated tokens or shares of memory; neither: SGLang's choice.

    Raises:
        BenchError: both are given, or one is no list of numbers.
    """
    if pool and share:
        raise BenchError("--pool and --mem-fraction exclude each other")
    if pool:
        if not re.fullmatch(r"\d+(,\d+)*", pool):
            raise BenchError(
                f"--pool takes auto or tokens, such as 4096 or 2048,4096, not {pool!r}"
            )
        return _different([PoolSize(tokens=int(part)) for part in pool.split(",")])
    if share:
        try:
            return _different([PoolSize(share=float(part)) for part in share.split(",")])
        except ValueError as error:
            raise BenchError(f"--mem-fraction takes numbers, not {share!r}") from error
    return (PoolSize(),)


def _different(memories: Sequence[PoolSize]) -> tuple[PoolSize, ...]:
    return tuple(dict.fromkeys(memories))
