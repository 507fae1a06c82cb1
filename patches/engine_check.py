"""What STEP needs of SGLang besides the signatures of ``contract``: its version, the fields that
hooks read, and the bodies of functions that are trusted to do something in a certain way.

Only looks; who asks decides what to do about what is found.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from step_sglang import protocol
from step_sglang.patches.reader import Installed, MissingError, Reader

TESTED_VERSIONS = ("0.5.22", "0.5.23")


@dataclass(frozen=True)
class Difference:
    """Something that the installed SGLang does not have as it was when STEP was tested.

    ``fatal``: STEP cannot work then; else it may, and whoever has tried may say so.
    """

    what: str
    expected: str
    found: str
    fatal: bool

    def __str__(self) -> str:
        return f"MISMATCH  {self.what}\n  expected: {self.expected}\n  found:    {self.found}"


@dataclass(frozen=True)
class Body:
    """A function whose texts were read, and what of them STEP relies on."""

    path: str
    digests: tuple[str, ...]  # one for each text that a tested version has, the newest first
    why: str


_MODEL = "sglang.srt.model_executor"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_BATCH = "sglang.srt.managers.schedule_batch"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager"

# What hooks read or set. A class, and names that it declares or that its methods set.
FIELDS: dict[str, tuple[str, ...]] = {
    f"{_MODEL}.forward_batch_info.ForwardBatch": (
        "forward_mode", "batch_size", "input_ids", "positions", "req_pool_indices",
        "extend_seq_lens",
    ),
    f"{_BATCH}.Req": (
        "rid", "kv", "output_ids", "origin_input_ids", "sampling_params", "finished_reason",
        "to_finish", "prefix_len", "host_hit_length", "extend_len", "full_untruncated_fill_ids",
        "last_node", "extra_key", "skip_radix_cache_insert", "return_logprob", "time_stats",
        "priority", "grammar", "session", "beam_group", "lora_id", "cache_salt",
    ),
    "sglang.srt.sampling.sampling_params.SamplingParams": (
        "max_new_tokens", "min_new_tokens", "ignore_eos", "stop_strs", "stop_regex_strs",
        "stop_token_ids", "temperature", "top_p", "top_k", "min_p", "logit_bias",
        "frequency_penalty", "presence_penalty", "repetition_penalty",
    ),
    f"{_BATCH}.ReqKvInfo": (
        "req_pool_idx", "cache_protected_len", "kv_allocated_len", "kv_committed_len",
    ),
    f"{_BATCH}.ScheduleBatch": (
        "reqs", "forward_mode", "batch_is_full", "decoding_reqs", "extend_lens",
        "token_to_kv_pool_allocator",
    ),
    "sglang.srt.managers.schedule_policy.PrefillAdder": (
        "memory_budget", "can_run_list", "running_batch", "tree_cache", "rem_chunk_tokens",
        "page_size", "per_req_token_overhead",
    ),
    "sglang.srt.mem_cache.prefill_budget.PrefillBudget": ("total_offset",),
    "sglang.srt.managers.auxiliary_output.CommittedTokens": ("output_index", "token_ids"),
    "sglang.srt.layers.logits_processor.LogitsProcessorOutput": (
        "next_token_logits", "auxiliary_device_output",
    ),
    f"{_MODEL}.model_runner.ModelRunnerOutput": ("can_run_graph",),
    f"{_MODEL}.model_runner.ModelRunner": (
        "decode_cuda_graph_runner", "req_to_token_pool", "device", "dtype",
    ),
    f"{_MODEL}.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner": ("capture_bs",),
    "sglang.srt.mem_cache.memory_pool.ReqToTokenPool": ("req_to_token", "size"),
    _SCHEDULER: (
        "waiting_queue", "running_batch", "chunked_req", "grammar_manager", "policy", "page_size",
        "enable_priority_scheduling", "enable_priority_preemption", "is_hybrid_swa", "tree_cache",
        "tp_worker", "attn_tp_group", "attn_tp_cpu_group", "output_streamer", "server_args",
        "tokenizer", "model_config", "metrics_collector", "metrics_collector_context",
        "token_to_kv_pool_allocator",
    ),
    f"{_BATCH}.NextBatchPlan": ("running_batch",),
    "sglang.srt.managers.schedule_policy.SchedulePolicy": ("priority_sign",),
    f"{_TOKENIZER}.TokenizerManager": (
        "rid_to_state", "server_args", "gracefully_exit", "incremental_streaming_output",
        "tokenizer", "enable_metrics", "metrics_collector",
    ),
    f"{_TOKENIZER}.ReqState": ("obj", "out_list", "time_stats", "lora_released"),
    "sglang.srt.managers.io_struct.GenerateReqInput": (
        "rid", "stream", "sampling_params", "is_single", "batch_size", "parallel_sample_num",
        "session_params", "return_logprob", "background", "external_trace_header",
    ),
    "sglang.srt.observability.req_time_stats.ReqTimeStatsBase": ("trace_ctx",),
    "sglang.srt.observability.trace.TraceNullContext": ("tracing_enable",),
    "sglang.srt.observability.trace.TraceReqContext": (
        "tracing_enable", "root_span", "root_span_context",
    ),
    "sglang.srt.observability.trace_async.TraceReqContextAsync": (
        "tracing_enable", "root_span", "root_span_context",
    ),
}  # fmt: skip

BODIES: tuple[Body, ...] = (
    Body(
        f"{_SCHEDULER}.init_model_worker",
        ("7ca031376a0fb501", "2a134d1cc7988e2f"),
        "pools and attention exist before init_all_cuda_graphs, and nothing is captured before it",
    ),
    Body(
        f"{_SCHEDULER}.init_all_cuda_graphs",
        ("1965ac470b96d400",),
        "every graph is captured inside",
    ),
    Body(
        f"{_SCHEDULER}.update_running_batch",
        ("76674da3b22d550d", "9ff5c16dec73f8cf"),
        "memory is checked there, and retracts there",
    ),
    Body(
        f"{_BATCH}.ScheduleBatch.filter_batch",
        ("2c50ee4bc908b0b0",),
        "reqs is another list when requests leave, in the same order",
    ),
    Body(
        f"{_BATCH}.ScheduleBatch.merge_batch",
        ("af365fb4c698cd86",),
        "reqs is another list when requests come",
    ),
    Body(
        f"{_BATCH}.ScheduleBatch.check_decode_mem",
        ("89b2fc954145d6f5",),
        "it asks the allocator's check_decode_capacity",
    ),
    Body(
        f"{_BATCH}.ScheduleBatch.new_tokens_required_next_decode",
        ("15740580f6e89d58",),
        "a request needs a page when its last one is full",
    ),
    Body(
        "sglang.srt.mem_cache.allocation.alloc_for_decode_default",
        ("952fe66952e1c1b0",),
        "a decode step gives each request of the batch a token",
    ),
    Body(
        f"{_SCHEDULER}._get_new_batch_prefill_raw",
        ("5e9fe2612420c458", "95b486507b97d769"),
        "it starts only requests of waiting_queue, and adds to it by _add_request_to_queue alone",
    ),
    Body(
        "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
        ("bd59970b5064e776", "b10b5ab453bbe538"),
        "every pass goes through it, and sampling follows on the same stream",
    ),
    Body(
        f"{_MODEL}.model_runner.ModelRunner._forward_raw",
        ("f2ff4b54fffc3072", "cd6d613cf30a4bb4"),
        "a decode pass is a graph's replay exactly when it says can_run_graph",
    ),
    Body(
        f"{_MODEL}.model_runner.ModelRunner.sample",
        ("e509f64347964d8b",),
        "it clears auxiliary_device_output",
    ),
    Body(
        f"{_MODEL}.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.capture_prepare",
        ("8a2cd2bb2ebf748e", "9bb256d7ba76d7aa"),
        "the captured batch is a ForwardBatch over the runner's static buffers",
    ),
    Body(
        f"{_MODEL}.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.load_batch",
        ("ef0117d809acbfa4", "c305e2dcc6efb477"),
        "a replay gets its batch through those buffers",
    ),
    Body(
        f"{_MODEL}.cuda_graph_buffer_registry.build_decode_registry",
        ("a638f2b419bf857d", "d058cddaac0f969e"),
        "padded rows have slot 0 and position 0",
    ),
    Body(
        "sglang.srt.mem_cache.memory_pool.ReqToTokenPool.__init__",
        ("d9a4178ba8028f98",),
        "row 0 of the pool pads",
    ),
    Body(
        "sglang.srt.mem_cache.memory_pool.ReqToTokenPool.alloc",
        ("83d2da1b5fa9d443",),
        "row 0 is never given out",
    ),
    Body(
        "sglang.srt.managers.auxiliary_output.append_auxiliary_output",
        ("381c05a8b8586c0b",),
        "it keeps what others appended",
    ),
    Body(
        "sglang.srt.managers.scheduler_components.output_streamer."
        "_GenerationStreamAccumulator.accept",
        ("6fc63b18c1b3f3af", "2425cee74eed7420"),
        "what it reads of a request that streams nothing, its counts apart; see progress",
    ),
    Body(
        f"{_BATCH}.Req.init_incremental_detokenize",
        ("549d2809adc7e5ac",),
        "a request's text begins at the same place, however much of it there is",
    ),
    Body(
        "sglang.srt.mem_cache.common.release_kv_cache",
        ("79aba39f92f494b0",),
        "it frees what no other shares",
    ),
)


def differences(reader: Reader | None = None) -> list[Difference]:
    """Everything in which an SGLang (None: the installed one) differs, the fatal first."""
    reader = reader or Installed()
    return [*_missing_fields(reader), *_version(reader), *_changed_bodies(reader)]


def accepted(found: list[Difference]) -> bool:
    """Whether the operator has said that this SGLang works, and nothing speaks against it."""
    wanted = os.environ.get(protocol.UNTESTED_ENV) == "1"
    return wanted and not any(difference.fatal for difference in found)


def _version(reader: Reader) -> list[Difference]:
    found = reader.version()
    if found in TESTED_VERSIONS:
        return []
    return [Difference("sglang's version", " or ".join(TESTED_VERSIONS), found, fatal=False)]


def _missing_fields(reader: Reader) -> list[Difference]:
    found = []
    for path, names in FIELDS.items():
        try:
            declared = reader.declared(path)
        except MissingError as error:
            found.append(Difference(path, ", ".join(names), str(error), fatal=True))
            continue
        missing = [name for name in names if name not in declared]
        if missing:
            text = f"no {', '.join(missing)}"
            found.append(Difference(path, ", ".join(names), text, fatal=True))
    return found


def _changed_bodies(reader: Reader) -> list[Difference]:
    found = []
    for body in BODIES:
        try:
            text = reader.digest(body.path)
        except MissingError as error:
            text = str(error)
        if text not in body.digests:
            what = f"the text of {body.path}, trusted because {body.why}"
            found.append(Difference(what, " or ".join(body.digests), text, fatal=False))
    return found
