"""The one table of everything in SGLang that STEP hooks or calls, as it must be.

Checked against the installed SGLang whenever STEP is asked for: a server that silently runs
without pruning would be a defect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from step_sglang.patches.reader import Installed, MissingError, Reader


@dataclass(frozen=True)
class Target:
    """A name in SGLang and the parameters it must have (None: it only has to exist).

    A hooked target also says why it is hooked, and which change of SGLang would make that needless.
    """

    path: str
    parameters: tuple[str, ...] | None = None
    why: str = ""
    until: str = ""


@dataclass(frozen=True)
class Finding:
    """What the installed SGLang has in a target's place; ``found`` None means it matches."""

    target: Target
    found: str | None = None

    def __str__(self) -> str:
        expected = _shown(self.target.parameters)
        if self.found is None:
            return f"ok        {self.target.path}{expected}"
        return f"MISMATCH  {self.target.path}\n  expected: {expected}\n  found:    {self.found}"

    def explained(self) -> str:
        """The same, with the reason for the hook."""
        if not self.target.why:
            return str(self)
        return f"{self}\n  why:      {self.target.why}\n  until:    {self.target.until}"


@dataclass(frozen=True)
class Either:
    """Something that the versions of SGLang have in different places: one of them must be there.

    ``adapters`` says what is done with each form.
    """

    what: str
    forms: tuple[Target, ...]  # the newest first

    def form(self, reader: Reader) -> Target | None:
        """The newest form that an SGLang has."""
        return next((f for f in self.forms if _inspect(f, reader).found is None), None)


_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_ENGINE = "sglang.srt.entrypoints.engine.Engine"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_TOKENIZER_STATE = "sglang.srt.managers.tokenizer_manager.ReqState"
_ALLOCATOR = "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator"
_CONTROL = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_BATCH = "sglang.srt.managers.schedule_batch.ScheduleBatch"
_ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"
_REGISTRY = "sglang.srt.plugins.hook_registry.HookRegistry"
_REQUEST = "sglang.srt.managers.schedule_batch.Req"
_TIME_STATS = "sglang.srt.observability.req_time_stats"
_SENDER = "sglang.srt.managers.scheduler_components.output_sender.SenderWrapper"
_STREAMER = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"

# Flags and engine arguments: hooked in every process, because only they can ask for STEP.
ADD_CLI_ARGS = Target(
    f"{_SERVER_ARGS}.add_cli_args",
    ("parser",),
    why="adds the --step-* flags",
    until="plugins may declare arguments",
)
FROM_CLI_ARGS = Target(
    f"{_SERVER_ARGS}.from_cli_args",
    ("cls", "args"),
    why="takes the --step-* values into the server arguments",
    until="plugins may declare arguments",
)
LAUNCH_SUBPROCESSES = Target(
    f"{_ENGINE}._launch_subprocesses",
    (
        "cls", "server_args", "init_tokenizer_manager_func", "run_scheduler_process_func",
        "run_detokenizer_process_func", "port_args", "placement_group",
    ),
    why="checks the model, the scorer and the other arguments before any process starts",
    until="plugins may check the server arguments",
)  # fmt: skip

# The tokenizer manager's process.
INIT_REQ_STATE = Target(
    f"{_TOKENIZER}._init_req_state",
    ("self", "obj", "request"),
    why="marks the n samples of one prompt as one group",
    until="parallel samples carry the id of their request",
)
ABORT_REQUEST = Target(
    f"{_TOKENIZER}.abort_request",
    ("self", "rid", "abort_all"),
    why="ends the group of a voted request with that request",
    until="parallel samples end with the id of their request",
)
INIT_METRICS = Target(
    f"{_TOKENIZER}.init_metric_collector_watchdog",
    ("self",),
    why="counts votes beside SGLang's own metrics, from 0 on",
    until="plugins may have metrics of their own",
)
OPEN_SESSION = Target(
    f"{_TOKENIZER}.open_session",
    ("self", "obj", "request"),
    why="learns which sessions are streaming ones, whose turns are not voted",
    until="a request can ask what its session allows",
)
CLOSE_SESSION = Target(
    f"{_TOKENIZER}.close_session",
    ("self", "obj", "request"),
    why="forgets which traces answered the session's voted turns",
    until="parallel samples of a session's turn can be one turn",
)
CREATE_TOKENIZED_OBJECT = Target(
    f"{_TOKENIZER}._create_tokenized_object",
    ("self", "obj", "input_text", "input_ids", "input_embeds", "mm_inputs",
     "token_type_ids"),
    why="answers a malformed custom_params.step with status 400",
    until="plugins may validate custom_params",
)  # fmt: skip
UPDATE_REQUEST_META_INFO = Target(
    f"{_TOKENIZER}.update_request_meta_info",
    ("self", "meta_info", "state", "customized_info", "index", "finish_reason"),
    why="puts one value per request into meta_info, where SGLang expects one per token",
    until="customized info knows values per request here too",
)
GENERATE_REQUEST = Target(
    f"{_TOKENIZER}.generate_request",
    ("self", "obj", "request"),
    why="answers one request by the vote of many traces",
    until="a plugin may wrap a request",
)

# The HTTP server, in the tokenizer manager's process.
SERVE_GENERATE_REQUEST = Target(
    "sglang.srt.entrypoints.http_server.serve_generate_request",
    ("obj", "request"),
    why="sends the progress of a vote while /generate streams",
    until="streams may carry comments of a plugin",
)
INIT_MULTI_TOKENIZER = Target(
    "sglang.srt.entrypoints.http_server.init_multi_tokenizer",
    (),
    why="adds STEP's endpoints to a tokenizer worker, and lets workers ask each other",
    until="tokenizer workers load plugins",
)
ADD_API_KEY_MIDDLEWARE = Target(
    "sglang.srt.utils.auth.add_api_key_middleware",
    ("app", "api_key", "admin_api_key"),
    why="lets a browser that opens the live page show the server's key",
    until="SGLang has pages of its own that want the key",
)
CONVERT_CHAT = Target(
    "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._convert_to_internal_request",
    ("self", "request", "raw_request"),
    why="asks a chat for the boxed answer that its vote reads",
    until="a plugin may change a chat before it is rendered",
)
GENERATE_CHAT_STREAM = Target(
    "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._generate_chat_stream",
    ("self", "adapted_request", "request", "raw_request"),
    why="sends the progress of a vote while a chat streams",
    until="streams may carry comments of a plugin",
)
GENERATE_COMPLETION_STREAM = Target(
    "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion"
    "._generate_completion_stream",
    ("self", "adapted_request", "request", "raw_request"),
    why="sends the progress of a vote while a completion streams",
    until="streams may carry comments of a plugin",
)
ANSWER_CHAT = Target(
    "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._handle_non_streaming_request",
    ("self", "adapted_request", "request", "raw_request"),
    why="leaves pruned choices out of chat answers, and counts them in the usage",
    until="the number of choices may be less than n",
)
ANSWER_COMPLETION = Target(
    "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion"
    "._handle_non_streaming_request",
    ("self", "adapted_request", "request", "raw_request"),
    why="leaves pruned choices out of text completions, and counts them in the usage",
    until="the number of choices may be less than n",
)

# The scheduler's process.
INIT_ALL_CUDA_GRAPHS = Target(
    f"{_SCHEDULER}.init_all_cuda_graphs",
    ("self",),
    why="makes the per-slot state when the pools exist and no graph is captured yet",
    until="plugins are told when the pools exist",
)
CREATE_GENERATION_REQ = Target(
    f"{_SCHEDULER}._create_generation_req",
    ("self", "recv_req", "args", "kwargs"),
    why="gives a request its trace and group",
    until="plugins are told of a new request",
)
UPDATE_RUNNING_BATCH = Target(
    f"{_SCHEDULER}.update_running_batch",
    ("self", "batch"),
    why="prunes before SGLang would retract",
    until="the choice of whom to retract, and to end it, is a plugin's",
)
ADD_REQUEST_TO_QUEUE = Target(
    f"{_SCHEDULER}._add_request_to_queue",
    ("self", "req", "is_retracted"),
    why="lets a request of a group be tried at once, though the batch was full for others",
    until="admission is a plugin's",
)
ABORT_SCHEDULED = Target(
    f"{_SCHEDULER}.abort_request",
    ("self", "recv_req"),
    why="prunes a trace that a vote does not need, and says so; aborts a pruned trace whose place "
    "a branch may take, which neither waits nor runs",
    until="an abort carries a reason that its request's answer says, and every end passes the "
    "streamer",
)
GET_NEW_BATCH_PREFILL = Target(
    f"{_SCHEDULER}.get_new_batch_prefill",
    ("self", "running_batch"),
    why="lets the waiting requests take turns, and holds back what is over a limit",
    until="the scheduling policy is a plugin's",
)
GET_PREFILL_ADDER_CLASS = Target(
    f"{_SCHEDULER}.get_prefill_adder_class",
    ("self",),
    why="reserves nothing for the future of a prunable trace, and makes room for those who wait",
    until="the adder class is set in the server arguments",
)
GET_OUTPUT_STREAMER_CLASS = Target(
    f"{_SCHEDULER}.get_output_streamer_class",
    ("self",),
    why='sends meta_info["step"], and learns how a trace ended',
    until="the streamer class is set in the server arguments",
)
SEND_ABORT_OUTPUT = Target(
    f"{_SCHEDULER}.send_abort_output",
    ("self", "abort_req", "req"),
    why="learns of a request that ends outside the output stream",
    until="every end of a request passes the streamer",
)
SENDER_SEND_OUTPUT = Target(
    f"{_SENDER}.send_output",
    ("self", "output", "recv_obj"),
    why="learns of a request that ends outside the output stream",
    until="every end of a request passes the streamer",
)
FORWARD_BATCH_GENERATION = Target(
    "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
    (
        "self", "batch", "forward_batch", "pp_proxy_tensors", "is_verify",
        "skip_attn_backend_init", "capture_hidden_mode", "return_kv_loc_plan",
    ),
    why="resets reused slots on the forward stream, before the pass",
    until="auxiliary state per request is reset by SGLang",
)  # fmt: skip
LOGITS_FORWARD = Target(
    "sglang.srt.layers.logits_processor.LogitsProcessor.forward",
    (
        "self", "input_ids", "hidden_states", "lm_head", "logits_metadata",
        "aux_hidden_states", "hidden_states_before_norm",
    ),
    why="scores the hidden states inside the captured graph",
    until="an auxiliary head can be registered on the final hidden states",
)  # fmt: skip
SAMPLE = Target(
    "sglang.srt.model_executor.model_runner.ModelRunner.sample",
    ("self", "logits_output", "forward_batch"),
    why="reads the logits before sampling changes them, and sends the scores with the tokens",
    until="sample() keeps the auxiliary outputs of the forward pass",
)
EAGLE_SAMPLE = Target(
    "sglang.srt.speculative.eagle_utils.eagle_sample",
    (
        "verify_input", "batch", "logits_output", "grammar_mask", "uno_target_max_top_k",
        "watermark_state", "watermark_full_mask",
    ),
    why="learns which drafts were accepted, and scores the steps among them",
    until="auxiliary outputs are told which rows of a pass were committed",
)  # fmt: skip
GET_INTERNAL_STATE = Target(
    f"{_SCHEDULER}.get_internal_state",
    ("self", "recv_req"),
    why="shows STEP in /server_info, and answers the live page's questions",
    until="plugins may add to the internal state, and ask schedulers questions of their own",
)
MODEL_FORWARD = Target(
    "sglang.srt.model_executor.model_runner.ModelRunner.forward",
    (
        "self", "forward_batch", "skip_attn_backend_init", "pp_proxy_tensors",
        "reinit_attn_backend", "split_forward_count",
    ),
    why="learns whether a captured graph was replayed, in which no Python runs",
    until="the batch that is sampled says so",
)  # fmt: skip
CAPTURE_ONE_SHAPE = Target(
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
    ".capture_one_shape",
    ("self", "size", "forward", "stream_idx", "variant_label", "attention_variant"),
    why="makes sure that the op is in every decode graph",
    until="plugins may add work to the forward pass that is captured",
)
RECORD_WEIGHT_VERSION = Target(
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
    ".record_weight_version_after_update",
    ("self", "weight_version"),
    why="flags the scorer as stale when the weights change",
    until="plugins are told of new weights",
)

# The scheduler's process, on a virtual GPU alone.
PROCESS_BATCH_RESULT = Target(
    f"{_SCHEDULER}.process_batch_result",
    ("self", "batch", "result"),
    why="the simulated clock moves when the engine looks at what a pass gave",
    until="SGLang asks a plugin for the time",
)

HOOKED = (
    ADD_CLI_ARGS,
    FROM_CLI_ARGS,
    LAUNCH_SUBPROCESSES,
    INIT_REQ_STATE,
    ABORT_REQUEST,
    INIT_METRICS,
    OPEN_SESSION,
    CLOSE_SESSION,
    CREATE_TOKENIZED_OBJECT,
    UPDATE_REQUEST_META_INFO,
    GENERATE_REQUEST,
    SERVE_GENERATE_REQUEST,
    INIT_MULTI_TOKENIZER,
    ADD_API_KEY_MIDDLEWARE,
    CONVERT_CHAT,
    GENERATE_CHAT_STREAM,
    GENERATE_COMPLETION_STREAM,
    ANSWER_CHAT,
    ANSWER_COMPLETION,
    INIT_ALL_CUDA_GRAPHS,
    UPDATE_RUNNING_BATCH,
    ABORT_SCHEDULED,
    ADD_REQUEST_TO_QUEUE,
    GET_NEW_BATCH_PREFILL,
    GET_PREFILL_ADDER_CLASS,
    GET_OUTPUT_STREAMER_CLASS,
    FORWARD_BATCH_GENERATION,
    LOGITS_FORWARD,
    MODEL_FORWARD,
    CAPTURE_ONE_SHAPE,
    SAMPLE,
    EAGLE_SAMPLE,
    GET_INTERNAL_STATE,
    RECORD_WEIGHT_VERSION,
)

# Where versions differ; `adapters` has a row for each.
BIRTH = Either("where a request is made", (CREATE_GENERATION_REQ, ADD_REQUEST_TO_QUEUE))
ABORTS = Either(
    "where the end of an aborted request is sent", (SEND_ABORT_OUTPUT, SENDER_SEND_OUTPUT)
)
ROOM = Either(
    "how many requests may start",
    (
        Target(
            f"{_SCHEDULER}.get_num_allocatable_reqs",
            ("self", "running_bs", "beam_width", "running_batch", "num_held_rows"),
        ),
        Target(
            f"{_SCHEDULER}.get_num_allocatable_reqs",
            ("self", "running_bs", "beam_width", "running_batch"),
        ),
    ),
)
DIFFERENT = (BIRTH, ABORTS, ROOM)

# Hooked on a virtual GPU, beside the others.
VIRTUAL = (
    FORWARD_BATCH_GENERATION,
    PROCESS_BATCH_RESULT,
    Target(f"{_TIME_STATS}.time.perf_counter"),
    Target(f"{_TIME_STATS}.calibrate_time_diff", ()),
    Target("sglang.srt.managers.tokenizer_manager.time.perf_counter"),
    Target("sglang.srt.layers.logits_processor.LogitsProcessor.forward"),
    Target("sglang.srt.layers.vocab_parallel_embedding.ParallelLMHead"),
)

# Called or subclassed, not hooked.
USED = (
    Target(f"{_ENGINE}.server_args_class"),
    Target(f"{_SERVER_ARGS}.resolve_once", ("self",)),
    Target("sglang.srt.environ.envs.SGLANG_RUST_SERVER"),
    Target("sglang.cli.utils.get_is_diffusion_model", ("model_path",)),
    Target("sglang.cli.utils.try_get_model_path", ("extra_argv",)),
    Target("sglang.srt.plugins.hook_registry.HookSource", ("plugin_name", "dist_name")),
    Target("sglang.srt.plugins.hook_registry.HookType"),
    Target(f"{_REGISTRY}.register", ("cls", "target", "hook", "hook_type", "source")),
    Target(f"{_REGISTRY}.apply_hooks", ("cls",)),
    Target(f"{_REGISTRY}._apply_target", ("cls", "target", "hooks")),
    Target(f"{_REGISTRY}._patched"),
    Target(f"{_SCHEDULER}._reqs_finishing_inflight", ("self", "batch")),
    Target(f"{_REQUEST}.finished", ("self",)),
    Target(f"{_REQUEST}.release_mm_inputs_on_abort", ("self",)),
    Target(f"{_REQUEST}.reset_for_retract", ("self",)),
    Target(f"{_REQUEST}.refresh_fill_ids", ("self",)),
    Target("sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.evictable_size", ("self",)),
    Target("sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.supports_mamba", ("self",)),
    Target("sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.supports_swa", ("self",)),
    Target(
        "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.checkpoint",
        ("self", "req", "up_to", "kwargs"),
    ),
    Target("sglang.srt.managers.scheduler._make_abort_req", ("req", "finished_reason")),
    Target(
        "sglang.srt.managers.scheduler_components.batch_result_processor"
        ".SchedulerBatchResultProcessor._maybe_update_reasoning_tokens",
        ("self", "req", "next_token_id"),
    ),
    Target(
        "sglang.srt.utils.weight_versions.truncate_weight_version_events",
        ("events", "num_kept_tokens"),
    ),
    Target(f"{_BATCH}.is_empty", ("self",)),
    Target(f"{_BATCH}.check_decode_mem", ("self", "selected_indices")),
    Target(f"{_BATCH}.new_tokens_required_next_decode", ("self", "selected_indices")),
    Target(f"{_BATCH}.filter_batch", ("self", "reqs_to_exclude", "keep_indices")),
    Target("sglang.srt.mem_cache.common.release_kv_cache", ("req", "tree_cache", "checkpoint")),
    Target(
        "sglang.srt.managers.schedule_batch.FINISH_ABORT",
        ("message", "status_code", "err_type"),
    ),
    Target("sglang.srt.utils.common.get_cuda_graph_max_batch_size", ("max_batch_size",)),
    Target("sglang.srt.utils.common.get_eager_max_batch_size", ("max_batch_size",)),
    Target("sglang.srt.managers.schedule_batch.FINISH_ABORT.to_json", ("self",)),
    Target("sglang.version.__version__"),
    Target("sglang.srt.runtime_context.get_parallel", ()),
    Target("sglang.srt.runtime_context.get_spec", ()),
    Target("sglang.srt.mem_cache.allocation_sizing.get_alloc_reserve_per_decode", ()),
    Target("sglang.srt.model_executor.runner_utils.capture_mode.get_is_capture_mode", ()),
    Target("sglang.srt.model_executor.forward_batch_info.ForwardBatch"),
    Target("sglang.srt.model_executor.forward_batch_info.ForwardMode.is_decode", ("self",)),
    Target(
        "sglang.srt.model_executor.forward_batch_info.ForwardMode.is_extend",
        ("self", "include_draft_extend_v2"),
    ),
    Target("sglang.srt.managers.auxiliary_output.append_auxiliary_output", ("current", "output")),
    Target(f"{_ADDER}._get_running_request_total_token_offset", ("self", "req")),
    Target(f"{_ADDER}.add_one_req", ("self", "req", "has_chunked_req", "truncation_align_size")),
    Target(f"{_ADDER}.add_chunked_req", ("self", "req")),
    Target(f"{_ADDER}.budget_state", ("self",)),
    Target(f"{_ADDER}.preempt_to_schedule", ("self", "req")),
    Target(f"{_ADDER}.ceil_paged_tokens", ("self", "tokens")),
    Target(f"{_ADDER}._lock_node", ("self", "last_node", "lock_host")),
    Target(f"{_ADDER}.cur_rem_tokens"),
    Target(f"{_ADDER}.rem_total_tokens"),
    Target("sglang.srt.managers.tp_worker.TpModelWorker.get_decode_cuda_graph_bs", ("self",)),
    Target("sglang.srt.constrained.grammar_manager.GrammarManager.has_waiting_grammars", ("self",)),
    Target("sglang.srt.managers.schedule_policy.AddReqResult.NO_TOKEN"),
    Target("sglang.srt.managers.schedule_policy.AddReqResult.OTHER"),
    Target("sglang.srt.managers.schedule_policy.CLIP_MAX_NEW_TOKENS"),
    Target(f"{_TOKENIZER}._handle_abort_req", ("self", "recv_obj")),
    Target("sglang.srt.managers.io_struct.TokenizedGenerateReqInput.routed_dp_rank"),
    Target("sglang.srt.managers.io_struct.AbortReq"),
    Target("sglang.srt.managers.io_struct.AbortReq.abort_message"),
    Target(f"{_TOKENIZER}._dispatch_to_scheduler", ("self", "obj")),
    Target(f"{_TIME_STATS}.SchedulerReqTimeStats.queue_duration_s"),
    Target(f"{_TIME_STATS}.SchedulerReqTimeStats.set_completion_time", ("self", "ts")),
    Target(f"{_TIME_STATS}.APIServerReqTimeStats.set_finished_time", ("self", "ts", "span_attrs")),
    Target("sglang.srt.observability.trace.get_global_tracing_enabled", ()),
    *(
        Target(f"sglang.srt.observability.{context}.{method}", parameters)
        for context in ("trace.TraceReqContext", "trace_async.TraceReqContextAsync")
        for method, parameters in (
            ("trace_event", ("self", "name", "level", "ts", "attrs")),
            ("trace_set_thread_attrs", ("self", "attrs")),
            ("trace_set_root_attrs", ("self", "attrs")),
        )
    ),
    Target(f"{_CONTROL}.init_communicators", ("self",)),
    Target(f"{_TOKENIZER}.auto_create_handle_loop", ("self",)),
    Target("sglang.srt.managers.communicator.FanOutCommunicator.__call__", ("self", "obj")),
    Target("sglang.srt.managers.io_struct.GetInternalStateReq.rid"),
    Target("sglang.srt.managers.io_struct.GetInternalStateReqOutput.internal_state"),
    Target(f"{_TOKENIZER_STATE}.get_text", ("self",)),
    Target("sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.evictable_size", ("self",)),
    Target(
        "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.available_size", ("self",)
    ),
    Target("sglang.srt.utils.auth.auth_level", ("level",)),
    Target("sglang.srt.utils.auth.AuthLevel.ADMIN_OPTIONAL"),
    Target(f"{_STREAMER}.stream_output", ("self", "reqs", "return_logprob", "skip_req")),
    Target(f"{_STREAMER}.build_additional_customized_info", ("self", "reqs")),
    Target(f"{_STREAMER}.is_request_level_customized_info_key", ("self", "key")),
    Target(
        "sglang.srt.utils.broadcast_pyobj",
        ("data", "rank", "dist_group", "src", "force_cpu_device"),
    ),
    Target("sglang.srt.constants.HEALTH_CHECK_RID_PREFIX"),
    Target("sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments"),
    Target("sglang.srt.managers.io_struct.GenerateReqInput.regenerate_rid", ("self",)),
    Target("sglang.srt.managers.io_struct.GenerateReqInput.__getitem__", ("self", "i")),
    Target("sglang.srt.entrypoints.api_contract.generate_contract_error", ("body",)),
    Target("sglang.srt.entrypoints.openai.protocol.ChatCompletionMessageContentTextPart"),
    Target("sglang.srt.entrypoints.http_server._global_state"),
    Target("sglang.srt.entrypoints.http_server.app"),
    Target(
        "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint.generate",
        ("self", "s", "sampling_params"),
    ),
    Target(
        "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint.generate_stream",
        ("self", "s", "sampling_params"),
    ),
    Target("sglang.lang.chat_template.ChatTemplate"),
    Target("sglang.utils.http_request"),
    Target("sglang.lang.ir.SglSamplingParams.to_srt_kwargs", ("self",)),
    Target("sglang.srt.arg_groups.overrides.resolving_view", ("server_args",)),
    Target("sglang.srt.arg_groups.model_override_base.model_config_of", ("server_args",)),
    Target("sglang.srt.utils.hf_transformers_utils.get_tokenizer"),
)


def inspect_targets(
    targets: tuple[Target, ...] = (*HOOKED, *USED),
    different: tuple[Either, ...] = DIFFERENT,
    reader: Reader | None = None,
) -> list[Finding]:
    """Compare targets with an SGLang (None: the installed one), in the tables' order."""
    reader = reader or Installed()
    found = [_inspect(target, reader) for target in targets]
    return [*found, *(_inspect_either(either, reader) for either in different)]


def mismatches(
    targets: tuple[Target, ...] = (*HOOKED, *USED), different: tuple[Either, ...] = DIFFERENT
) -> list[Finding]:
    """The targets that the installed SGLang does not have as they must be."""
    return [found for found in inspect_targets(targets, different) if found.found is not None]


def every_target() -> Iterator[Target]:
    """Of all tables, each form of those that differ too."""
    yield from (*HOOKED, *USED)
    for either in DIFFERENT:
        yield from either.forms


def _inspect_either(either: Either, reader: Reader) -> Finding:
    """What is missing is told of the newest form."""
    form = either.form(reader)
    return Finding(form) if form is not None else _inspect(either.forms[0], reader)


def _inspect(target: Target, reader: Reader) -> Finding:
    try:
        if target.parameters is None:
            reader.has(target.path)
            return Finding(target)
        found = reader.parameters(target.path)
    except MissingError as error:
        return Finding(target, str(error))
    return Finding(target) if found == target.parameters else Finding(target, _shown(found))


def _shown(parameters: tuple[str, ...] | None) -> str:
    return "" if parameters is None else f"({', '.join(parameters)})"
