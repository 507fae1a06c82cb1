"""Several tokenizer workers: hooks in processes that SGLang starts without its plugins.

The main process names another application for them, `worker_app`, by the variable with which
SGLang lets one be named; that hooks the process, and is then the application that was named before.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from step_sglang import protocol
from step_sglang.patches import endpoint, peers
from step_sglang.patches.aborts import abort_votes, end_traces
from step_sglang.patches.server_args import config_of

_APP = f"{__package__}.worker_app:app"


def prepare() -> None:
    """In the main process: let the workers that it starts be hooked, and find each other."""
    from sglang.srt.environ import envs

    folder = tempfile.mkdtemp(prefix="step-sglang-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[protocol.WORKERS_ENV] = folder
    wanted = envs.SGLANG_HTTP_SERVER_APP_PATH
    if wanted.get() != _APP:
        os.environ[protocol.APP_ENV] = wanted.get()
        wanted.set(_APP)


async def init_multi_tokenizer(original: Callable[[], Awaitable[Any]]) -> Any:
    """AROUND ``init_multi_tokenizer``, with which a worker begins."""
    server_args = await original()
    config = config_of(server_args)
    if config is not None:
        endpoint.add_endpoints(config, several=True)
        await peers.join(Path(os.environ[protocol.WORKERS_ENV]), _answer)
    return server_args


async def _answer(question: Mapping[str, Any]) -> Any:
    """What another worker wants to know of this one, or to be done here."""
    manager = sys.modules[endpoint.SERVER]._global_state.tokenizer_manager
    match dict(question):
        case {protocol.ASK_ABORT_GROUP: group}:
            return endpoint.abort_members(manager, group)
        case {protocol.ASK_END_TRACES: rids}:
            return end_traces(manager, rids)
        case {protocol.ASK_ABORT_VOTES: rid}:
            abort_votes(manager, rid)
    return None
