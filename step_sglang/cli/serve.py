"""`step-sglang serve`: the real SGLang server with STEP, and a first request that it can answer."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from step_sglang.cli.common import MEMORY, MODEL, SCORER_HELP, err, out
from step_sglang.client.launch import DIE_WITH_PARENT, plain_cpu, stop, wait_until_healthy
from step_sglang.config import AUTO
from step_sglang.errors import ServerError, SourceError

REASONER_POOL = 4096  # KV tokens; about a quarter of what 64 of its traces want, so that it prunes
_FIRST_QUESTION = "What is the sum of the first 20 prime numbers?"
_START_TIMEOUT = 3600.0  # seconds; a model may have to be downloaded


def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="`reasoner`, `reasoner-dwelling` (the embedded models), or a path or name."
        ),
    ] = "reasoner",
    server_flags: Annotated[
        list[str] | None, typer.Argument(help="After `--`: more flags of SGLang; they win.")
    ] = None,
    scorer: Annotated[
        str, typer.Option(help=f"The model's scorer: {SCORER_HELP}.", rich_help_panel=MODEL)
    ] = AUTO,
    host: Annotated[str, typer.Option(rich_help_panel=MODEL)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, rich_help_panel=MODEL)] = 30000,
    pool: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=MEMORY,
            help=f"KV pool in tokens. Default: SGLang's choice; reasoner: {REASONER_POOL}, in "
            "which 64 traces do not fit; on a CPU 65536.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Start an SGLang server with STEP; print a first request once it answers. Ctrl-C ends it.

    Without a GPU it runs on the plain-CPU platform of this package. The command that it runs is
    printed, so it can be run by itself.
    """
    more = list(server_flags or ())
    if model.startswith("-"):  # `serve -- --flag`: the first word is no model
        model, more = "reasoner", [model, *more]
    command, environment = server_command(model, more, scorer, host, port, pool)
    _check_port(host, port)
    shown = " ".join(f"{key}={value}" for key, value in environment.items())
    err.print(f"{shown} {' '.join(command)}".strip(), style="dim", markup=False, highlight=False)
    err.print("starting (half a minute with the reasoner; a large model takes minutes) ...")
    process = subprocess.Popen(
        [sys.executable, "-c", DIE_WITH_PARENT, *command],
        env={**os.environ, **environment},
        start_new_session=True,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, frame: process.send_signal(got))
    address = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
        host, f"[{host}]" if ":" in host else host
    )
    url = f"http://{address}:{port}"

    def greet() -> None:
        if wait_until_healthy(url, lambda: process.poll() is None, _START_TIMEOUT):
            out.print(first_request(model, url), markup=False, highlight=False)
            out.file.flush()

    threading.Thread(target=greet, daemon=True).start()
    status = process.wait()
    stop(process)  # one that was ended while it started may leave its children
    raise typer.Exit(128 - status if status < 0 else status)


def _check_port(host: str, port: int) -> None:
    """Refuse a port that is taken, which SGLang would find out when the model is loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            nowhere = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
            wrong = "host" if nowhere else "port"
            raise ServerError(
                f"cannot serve at {host}:{port} ({error.strerror}): give another --{wrong}"
            ) from error


def server_command(
    model: str,
    more: list[str],
    scorer: str,
    host: str,
    port: int,
    pool: int | None,
) -> tuple[list[str], dict[str, str]]:
    """The launch command, and what it needs in its environment.

    Raises:
        ScorerError: there is no such scorer, or none is known for the model.
        SourceError: the model is a path that does not exist.
    """
    from step_sglang.reasoner import model_path
    from step_sglang.scoring.locate import locate_scorer
    from step_sglang.voting.suffix import reasoner_name

    if not model:
        raise SourceError("the model's name is empty: give a path, a name, or `reasoner`")
    environment, flags = plain_cpu(more)
    ours = reasoner_name(model)
    if ours is not None:
        path, pool = str(model_path(ours)), pool or REASONER_POOL
    else:
        path = model
        if model.startswith((".", "/", "~")) and not Path(model).expanduser().exists():
            raise SourceError(f"there is no model {model}")
    file = locate_scorer(scorer, model)
    if pool is not None:
        flags += ["--max-total-tokens", str(pool)]
    return [
        sys.executable, "-m", "sglang.launch_server", "--model-path", path, "--host", host,
        "--port", str(port), "--enable-metrics", "--enable-step", "--step-scorer", file,
        *flags, *more,
    ], environment  # fmt: skip


def first_request(model: str, url: str) -> str:
    """Words for a server that answers: a command, and the same as a plain request."""
    from step_sglang.reasoner import questions
    from step_sglang.voting.suffix import is_reasoner

    question = questions("test", 1)[0].question if is_reasoner(model) else _FIRST_QUESTION
    more = '"temperature": 1.0, ' if is_reasoner(model) else ""
    about = (
        " The reasoner knows chains of arithmetic modulo 13\nlike this one, and nothing else."
        if is_reasoner(model)
        else ""
    )
    return (
        f"\nThe server answers at {url}.{about} A first question:\n\n"
        f"    step-sglang ask '{question}' --url {url}\n\n"
        "or with any client (64 traces vote, one choice comes back):\n\n"
        f"    curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{\n"
        f'      "model": "default", {more}"return_meta_info": true,\n'
        f'      "messages": [{{"role": "user", "content": "{question}"}}],\n'
        '      "custom_params": {"step": {"traces": 64}}}\'\n'
    )
