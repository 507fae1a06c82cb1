"""One row for each thing that the versions of SGLang have in different places.

What an SGLang has decides, not its version. A row names what differs (``contract.Either``) and the
hook that goes with each form; ``older`` holds what the older forms need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from step_sglang.errors import ConfigError
from step_sglang.patches import contract
from step_sglang.patches.contract import Either, Target
from step_sglang.patches.reader import Installed


@dataclass(frozen=True)
class Hook:
    """One hook: where, how, and which function ("module:name" in this package, loaded late)."""

    target: Target
    kind: HookType
    function: str

    def load(self) -> Callable[..., Any]:
        """Import the hook body."""
        module, name = self.function.split(":")
        function: Callable[..., Any] = getattr(import_module(f"{__package__}.{module}"), name)
        return function


@dataclass(frozen=True)
class Adapter:
    """The hooks for each form of something that the versions have in different places."""

    either: Either
    hooks: Mapping[Target, Hook]

    def chosen(self) -> Hook:
        """The hook for the form that the installed SGLang has.

        Raises:
            ConfigError: it has none of them.
        """
        form = self.either.form(Installed())
        if form is None:
            paths = " or ".join(form.path for form in self.either.forms)
            raise ConfigError(f"this SGLang has no {paths}: {self.either.what}")
        return self.hooks[form]


# 0.5.23 makes every request of a scheduler in one method. Before, the first place that all of them
# pass is the queue.
BIRTH = Adapter(
    contract.BIRTH,
    {
        contract.CREATE_GENERATION_REQ: Hook(
            contract.CREATE_GENERATION_REQ, HookType.AFTER, "scheduler:create_generation_req"
        ),
        contract.ADD_REQUEST_TO_QUEUE: Hook(
            contract.ADD_REQUEST_TO_QUEUE, HookType.BEFORE, "older:born_in_queue"
        ),
    },
)
VIRTUAL_BIRTH = Adapter(
    contract.BIRTH,
    {
        contract.CREATE_GENERATION_REQ: Hook(
            contract.CREATE_GENERATION_REQ, HookType.AFTER, "virtual.hooks:create_generation_req"
        ),
        contract.ADD_REQUEST_TO_QUEUE: Hook(
            contract.ADD_REQUEST_TO_QUEUE, HookType.BEFORE, "older:played_from_queue"
        ),
    },
)
# 0.5.23 reports every request that ends outside the output stream in one method of the scheduler.
# Before, each place sends for itself.
ABORTS = Adapter(
    contract.ABORTS,
    {
        contract.SEND_ABORT_OUTPUT: Hook(
            contract.SEND_ABORT_OUTPUT, HookType.AFTER, "scheduler:send_abort_output"
        ),
        contract.SENDER_SEND_OUTPUT: Hook(
            contract.SENDER_SEND_OUTPUT, HookType.AFTER, "older:output_sent"
        ),
    },
)

# Settings that STEP refuses, and that not every version has.
_NEWER_SETTINGS = frozenset({"enable_nvidia_megakernel"})  # of 0.5.23


def asked_for(server_args: Any, setting: str) -> bool:
    """Whether a setting is on; one that this SGLang does not have cannot be."""
    assert setting in _NEWER_SETTINGS, setting
    return bool(getattr(server_args, setting, False))
