"""The only place that knows SGLang's insides; installed as ``step_sglang.patches``.

``contract`` lists every target; the other modules hold small hook bodies that translate the
engine's objects and delegate to ``step_sglang``. ``register`` is SGLang's plugin entry point.
"""

from __future__ import annotations

import multiprocessing
import os
import sys

from step_sglang import protocol


def register() -> None:
    """Install the hooks that this process needs. SGLang calls it in each of its processes.

    A main process gets only the flags; if they ask for STEP, the tokenizer manager's hooks
    follow. A scheduler process gets its hooks when its main process asked for STEP. Other children
    get none: importing the scheduler only to hook it would cost them its start-up time.
    """
    from step_sglang.patches import flags, hooks, preflight

    child = protocol.HOOKS_ENV in os.environ and multiprocessing.parent_process() is not None
    if child and "sglang.srt.managers.scheduler" in sys.modules:
        try:
            hooks.register(hooks.SCHEDULER)
            if protocol.VIRTUAL_GPU_ENV in os.environ:
                from step_sglang.patches.virtual.hooks import IN_SCHEDULER, take_over_time

                hooks.register(hooks.VIRTUAL_GPU)
                take_over_time(IN_SCHEDULER)
        except Exception as error:
            # SGLang logs a plugin's exception and serves on; without pruning it must not.
            raise SystemExit(f"step-sglang: the scheduler's hooks do not load: {error}") from error
    # A child can itself become a main process: a program may make its engines in workers.
    if not child or "sglang.srt.entrypoints.engine" in sys.modules:
        preflight.refuse_diffusion_pipelines(sys.argv)
        hooks.register(hooks.FLAGS)
        flags.accept_engine_arguments()
