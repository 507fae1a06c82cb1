"""Hooks that put a virtual GPU under SGLang: which trace a request plays, and what time it is.

They come beside STEP's own, in the processes that STEP hooks, where the environment names the
folder of a model that plays traces.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from step_sglang import protocol
from step_sglang.errors import ConfigError
from step_sglang.patches import contract
from step_sglang.simulation.clock import Clock, GpuTime
from step_sglang.simulation.model import CLOCK_FILE, SPEED_FILE
from step_sglang.simulation.speed import Speed

# What stamps requests, by `time.perf_counter`.
IN_SCHEDULER = ("sglang.srt.observability.req_time_stats",)
IN_TOKENIZER_MANAGER = (*IN_SCHEDULER, "sglang.srt.managers.tokenizer_manager")
_PLAYED = "step_played"  # on a request: question and number of the trace that it plays
# Real seconds that the engine waits after a trace ended of which someone may say that it was the
# last: without a GPU it would be some steps further when it hears of that.
_HEARING = 0.05


@dataclass
class _Virtual:
    """Of one scheduler process."""

    gpu: GpuTime
    speed: Speed
    asked: Counter[str] = field(default_factory=Counter)  # requests so far, by who asked


@lru_cache(maxsize=1)
def _virtual() -> _Virtual:
    folder = Path(os.environ[protocol.VIRTUAL_GPU_ENV])
    speed = Speed.read(folder / SPEED_FILE)
    return _Virtual(GpuTime(Clock(folder / CLOCK_FILE)), speed)


class _Simulated:
    """The module ``time``, with simulated seconds, which begin with the clock and not in 1970."""

    def __init__(self, clock: Clock) -> None:
        self.perf_counter = self.time = clock.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def take_over_time(modules: Sequence[str]) -> None:
    """Let the stamps on requests be simulated seconds.

    Raises:
        ConfigError: the installed SGLang is not as it must be.
    """
    wrong = contract.mismatches(contract.VIRTUAL, (contract.BIRTH,))
    if wrong:
        raise ConfigError(
            "a virtual GPU needs another SGLang than the installed one:\n"
            + "\n".join(map(str, wrong))
        )
    clock = Clock(Path(os.environ[protocol.VIRTUAL_GPU_ENV]) / CLOCK_FILE)
    for name in modules:
        import_module(name).time = _Simulated(clock)  # type: ignore[attr-defined]
    # Stamps of two processes are compared: neither may still add the machine's own time.
    import_module(IN_SCHEDULER[0]).calibrate_time_diff()


def create_generation_req(req: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``Scheduler._create_generation_req``: the traces of a question, in the order in which
    its requests come.
    """
    params = req.sampling_params
    wanted = (params.custom_params or {}).get(protocol.PLAY_KEY)
    if params.max_new_tokens == 0:  # the prompt alone, before its samples
        return
    model = scheduler.tp_worker.model_runner.model
    if not isinstance(wanted, list) or len(wanted) != 2 or not model.has(wanted[0]):
        return
    question, asked = wanted[0], str(wanted[1])
    virtual = _virtual()
    number = virtual.asked[asked]
    virtual.asked[asked] += 1
    setattr(req, _PLAYED, (question, number))


def plays(req: Any) -> bool:
    """Whether it is known what a request plays."""
    return getattr(req, _PLAYED, None) is not None


def forward_batch_generation(worker: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``TpModelWorker.forward_batch_generation``: what plays, and how long it takes."""
    virtual = _virtual()
    total = batch.seq_lens_cpu.tolist()
    if not batch.forward_mode.is_extend():
        virtual.gpu.launched(virtual.speed.decode(len(total), sum(total)))
        return
    decoding = set(batch.decoding_reqs or ())
    model = worker.model_runner.model
    for req in (req for req in batch.reqs if req not in decoding):
        played = getattr(req, _PLAYED, None)
        if played is None:
            model.rest(req.kv.req_pool_idx)
        else:
            model.play(req.kv.req_pool_idx, *played, prompt=len(req.origin_input_ids))
    virtual.gpu.launched(virtual.speed.prefill(batch.extend_lens, total))


def process_batch_result(scheduler: Any, batch: Any, result: Any) -> None:
    """BEFORE ``Scheduler.process_batch_result``."""
    _virtual().gpu.completed()


def batch_result_processed(value: None, scheduler: Any, batch: Any, result: Any) -> None:
    """AFTER ``Scheduler.process_batch_result``: time stands still while a client is told."""
    if any(_heard(req) for req in batch.reqs):
        time.sleep(_HEARING)


def _heard(req: Any) -> bool:
    if not req.finished() or not plays(req):
        return False
    asked = req.sampling_params.stream_interval
    return asked is not None and asked < protocol.NEVER_STREAMED
