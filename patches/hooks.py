"""Ties every hooked target of ``contract`` to the function that hooks it."""

from __future__ import annotations

from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

from step_sglang.errors import ConfigError
from step_sglang.patches import adapters, contract
from step_sglang.patches.adapters import Adapter, Hook

_SOURCE = HookSource("step", "step-sglang")


FLAGS = (
    Hook(contract.ADD_CLI_ARGS, HookType.AFTER, "flags:add_cli_args"),
    Hook(contract.FROM_CLI_ARGS, HookType.AROUND, "flags:from_cli_args"),
)
TOKENIZER = (
    Hook(contract.LAUNCH_SUBPROCESSES, HookType.BEFORE, "preflight:launch_subprocesses"),
    Hook(contract.INIT_REQ_STATE, HookType.BEFORE, "parsed:init_req_state"),
    Hook(contract.ABORT_REQUEST, HookType.AFTER, "aborts:abort_request"),
    Hook(contract.INIT_METRICS, HookType.AFTER, "votes:init_metric_collector_watchdog"),
    Hook(contract.OPEN_SESSION, HookType.AROUND, "sessions:open_session"),
    Hook(contract.CLOSE_SESSION, HookType.BEFORE, "sessions:close_session"),
    Hook(contract.CREATE_TOKENIZED_OBJECT, HookType.AFTER, "tokenizer:create_tokenized_object"),
    Hook(contract.UPDATE_REQUEST_META_INFO, HookType.AROUND, "tokenizer:update_request_meta_info"),
    Hook(contract.GENERATE_REQUEST, HookType.AROUND, "voting:generate_request"),
)
HTTP = (
    Hook(contract.SERVE_GENERATE_REQUEST, HookType.AROUND, "http:serve_generate_request"),
    Hook(contract.ADD_API_KEY_MIDDLEWARE, HookType.AFTER, "page:add_api_key_middleware"),
    Hook(contract.CONVERT_CHAT, HookType.BEFORE, "http:convert_chat"),
    Hook(contract.GENERATE_CHAT_STREAM, HookType.AROUND, "http:generate_stream"),
    Hook(contract.GENERATE_COMPLETION_STREAM, HookType.AROUND, "http:generate_stream"),
    Hook(contract.ANSWER_CHAT, HookType.AROUND, "http:answer_whole"),
    Hook(contract.ANSWER_COMPLETION, HookType.AROUND, "http:answer_whole"),
)
# In each of several tokenizer workers, beside those two.
WORKER = (Hook(contract.INIT_MULTI_TOKENIZER, HookType.AROUND, "workers:init_multi_tokenizer"),)
SCHEDULER = (
    Hook(contract.INIT_ALL_CUDA_GRAPHS, HookType.AROUND, "scheduler:init_all_cuda_graphs"),
    adapters.BIRTH,
    Hook(contract.UPDATE_RUNNING_BATCH, HookType.BEFORE, "pruning:update_running_batch"),
    Hook(contract.ABORT_SCHEDULED, HookType.AROUND, "shrink:abort_request"),
    Hook(contract.ADD_REQUEST_TO_QUEUE, HookType.AFTER, "queue:add_request_to_queue"),
    Hook(contract.GET_NEW_BATCH_PREFILL, HookType.AROUND, "queue:get_new_batch_prefill"),
    Hook(contract.GET_PREFILL_ADDER_CLASS, HookType.AFTER, "admission:get_prefill_adder_class"),
    Hook(contract.GET_OUTPUT_STREAMER_CLASS, HookType.AFTER, "streaming:get_output_streamer_class"),
    adapters.ABORTS,
    Hook(contract.ABORT_SCHEDULED, HookType.AFTER, "places:abort_request"),
    Hook(contract.FORWARD_BATCH_GENERATION, HookType.BEFORE, "forward:forward_batch_generation"),
    Hook(contract.LOGITS_FORWARD, HookType.BEFORE, "forward:logits_forward"),
    Hook(contract.MODEL_FORWARD, HookType.AFTER, "forward:model_forward"),
    Hook(contract.CAPTURE_ONE_SHAPE, HookType.AROUND, "forward:capture_one_shape"),
    Hook(contract.SAMPLE, HookType.AROUND, "forward:sample"),
    Hook(contract.GET_INTERNAL_STATE, HookType.AROUND, "scheduler:get_internal_state"),
    Hook(contract.RECORD_WEIGHT_VERSION, HookType.AFTER, "scheduler:record_weight_version"),
)
# With speculative decoding only: its modules load what other servers do without.
SPECULATION = (Hook(contract.EAGLE_SAMPLE, HookType.AROUND, "verify:eagle_sample"),)

VIRTUAL_GPU = (
    adapters.VIRTUAL_BIRTH,
    Hook(
        contract.FORWARD_BATCH_GENERATION,
        HookType.BEFORE,
        "virtual.hooks:forward_batch_generation",
    ),
    Hook(contract.PROCESS_BATCH_RESULT, HookType.BEFORE, "virtual.hooks:process_batch_result"),
    Hook(contract.PROCESS_BATCH_RESULT, HookType.AFTER, "virtual.hooks:batch_result_processed"),
)

_registered: set[tuple[str, str]] = set()  # paths of targets, and functions


def register(hooks: tuple[Hook | Adapter, ...]) -> None:
    """Register hooks for SGLang to apply once every plugin has registered its own."""
    for hook in _chosen(hooks):
        if (hook.target.path, hook.function) not in _registered:
            HookRegistry.register(hook.target.path, hook.load(), hook.kind, source=_SOURCE)
            _registered.add((hook.target.path, hook.function))


def install(hooks: tuple[Hook | Adapter, ...]) -> None:
    """Register and apply hooks after SGLang applied the plugins' hooks; see :func:`verify`."""
    for hook in _chosen(hooks):
        if (hook.target.path, hook.function) in _registered:
            continue
        if hook.target.path in HookRegistry._patched:
            # Another plugin hooked it; the registry would skip a target it has patched before.
            HookRegistry._apply_target(hook.target.path, [(hook.kind, hook.load(), _SOURCE)])
            _registered.add((hook.target.path, hook.function))
        else:
            register((hook,))
    HookRegistry.apply_hooks()
    verify(hooks)


def verify(hooks: tuple[Hook | Adapter, ...]) -> None:
    """Make sure that hooks are in place.

    Raises:
        ConfigError: a hook could not be applied (SGLang itself only logs that).
    """
    missing = [
        hook.target.path for hook in _chosen(hooks) if hook.target.path not in HookRegistry._patched
    ]
    if missing:
        raise ConfigError(f"could not hook {', '.join(missing)}; the log says why")


def _chosen(hooks: tuple[Hook | Adapter, ...]) -> list[Hook]:
    return [hook.chosen() if isinstance(hook, Adapter) else hook for hook in hooks]
