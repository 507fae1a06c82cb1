"""Hooks in the tokenizer manager: what the server refuses, and the response's fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from step_sglang import protocol
from step_sglang.config import StepConfig
from step_sglang.errors import RequestError
from step_sglang.patches import sample
from step_sglang.patches.guard import guard
from step_sglang.patches.page import trace_finished
from step_sglang.patches.parsed import parsed_of, pruned_mode
from step_sglang.patches.server_args import config_of, ranks_of_a_batch, replicas
from step_sglang.patches.state import is_traced
from step_sglang.pruning.affinity import replica_of
from step_sglang.pruning.request import (
    StepRequest,
    check_group_size,
    refill_of,
    with_refill,
)


def create_tokenized_object(result: Any, manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``_create_tokenized_object``: a ValueError here is answered with status 400."""
    config = config_of(manager.server_args)
    if config is None:
        return
    _check_prompt(result)
    step_request = parsed_of(obj).trace
    if step_request is None:
        return
    params = result.sampling_params
    check_group_size(step_request, params.n)
    if (params.beam_width or 1) > 1:
        raise RequestError("custom_params.step does not work with beam search: drop one of them")
    if step_request.hidden_states and not config.capture:
        raise RequestError(
            "custom_params.step.hidden_states needs a server started with --step-capture"
        )
    _check_baseline(step_request, config)
    tokens = len(result.input_ids or ())
    if step_request.prompt_tokens is not None and step_request.prompt_tokens > tokens:
        raise RequestError(
            f"custom_params.step.prompt_tokens is {step_request.prompt_tokens}, but the input has "
            f"only {tokens} tokens"
        )
    _decide_refill(result, step_request, parsed_of(obj).voted, config, manager.server_args)
    sample.spare_if_chosen(result, manager, obj, step_request)
    number = replicas()
    if number > 1 and step_request.group is not None and result.routed_dp_rank is None:
        result.routed_dp_rank = replica_of(step_request.group, number)


def _check_prompt(result: Any) -> None:
    """Refuse what would end the scheduler: a prompt without tokens has no last position to read."""
    if not hasattr(result, "stream"):  # to be embedded, not to be continued
        return
    if result.session_id is not None or result.session_params is not None:
        return
    if not len(result.input_ids or ()) and not len(result.input_embeds or ()):
        raise RequestError(
            "the prompt has no tokens, and this tokenizer adds none of its own: send some text"
        )


def _decide_refill(
    result: Any, step_request: StepRequest, voted: bool, config: StepConfig, server_args: Any
) -> None:
    """Tell the scheduler what becomes of the places of this trace's group."""
    params = result.sampling_params
    mode = refill_of(
        step_request,
        config.refill,
        params.n,
        step_request.min_survivors or config.min_survivors,
        _why_no_branches(result, voted, config, server_args),
    )
    params.custom_params = with_refill(params.custom_params, mode)


def _why_no_branches(result: Any, voted: bool, config: StepConfig, server_args: Any) -> str | None:
    """Why no branch can take a request's place, if that is so."""
    params = result.sampling_params
    reasons = (
        (config.capture, "a server started with --step-capture prunes nothing"),
        (config.policy == "paper", "a server with --step-policy paper knows no groups"),
        (
            server_args.speculative_algorithm is not None,
            "this server decodes speculatively, which it does not work with",
        ),
        (
            server_args.strip_thinking_cache,
            "this server runs with --strip-thinking-cache, which frees text that branches share",
        ),
        (
            # One that is sent as a whole, at its end, may be.
            result.stream and not voted and (params.stream_interval or 1) < protocol.NEVER_STREAMED,
            "a streamed trace's text is out already: do not stream it",
        ),
        (result.return_logprob, "a branch has no log-probabilities of its parent's tokens"),
        (result.return_hidden_states, "a branch has no hidden states of its parent's tokens"),
        (
            bool(params.json_schema or params.regex or params.ebnf or params.structural_tag),
            "a grammar does not go back to a step boundary",
        ),
        (
            result.session_id is not None or result.session_params is not None,
            "a session's turns are not pruned and taken up again",
        ),
        (result.mm_inputs is not None, "it works with text alone, not with images, audio or video"),
        (
            result.input_embeds is not None or result.positional_embed_overrides is not None,
            "it works with tokens alone, not with embeddings",
        ),
        (result.custom_logit_processor is not None, "custom logit processors keep their own state"),
        (
            result.return_sampling_mask
            or result.return_routed_experts
            or result.return_indexer_topk,
            "a branch has no such values for its parent's tokens",
        ),
    )
    return next((text for holds, text in reasons if holds), None)


def _check_baseline(step_request: StepRequest, config: StepConfig) -> None:
    if step_request.baseline is None:
        return
    where = "custom_params.step.baseline"
    if config.capture or config.policy == "paper":
        raise RequestError(
            f"{where} needs a server with --step-policy fair and without --step-capture"
        )
    if not step_request.baseline.FOR_MEMORY and ranks_of_a_batch() > 1:
        # Ranks would have to agree after every step, on confidences that differ in the last bit.
        raise RequestError(
            f"{where} {step_request.baseline.NAME!r} needs a server with --tp-size 1"
        )


def update_request_meta_info(
    original: Callable[..., None],
    manager: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: dict[str, list[Any]],
    index: int,
    finish_reason: Any,
) -> None:
    """AROUND ``update_request_meta_info``: ours is one value per request, not one per token."""
    others = {key: values for key, values in customized_info.items() if key != protocol.META_KEY}
    original(manager, meta_info, state, others, index, finish_reason)
    with guard(protocol.IN_RESPONSES):
        step = customized_info.get(protocol.META_KEY)
        if step is None or step[index] is None:
            return
        extra = step[index].pop(protocol.META_EXTRA_TOKENS, None)
        meta_info[protocol.META_KEY] = step[index]
        if sample.is_kept(state.obj):
            step[index][protocol.META_SAMPLED] = True
        if extra is not None:
            # Every generated token counts once: in the place in which it was generated.
            for name, more in zip(("completion_tokens", "reasoning_tokens"), extra, strict=True):
                meta_info[name] += more
        if finish_reason is not None and is_traced(state):
            from step_sglang.patches import spans

            spans.trace_ended(state, step[index], finish_reason)
        if step[index][protocol.META_PRUNED] and finish_reason is not None:
            meta_info["finish_reason"] = _reported(manager, state.obj, meta_info, finish_reason)
        elif finish_reason is not None and finish_reason["type"] != "abort":
            trace_finished(meta_info, state)
            sample.trace_finished(meta_info, state, finish_reason["type"])


def _reported(
    manager: Any, obj: Any, meta_info: Mapping[str, Any], finish_reason: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The finish reason that the request, or else the server, wants of a pruned trace."""
    config, trace = config_of(manager.server_args), parsed_of(obj).trace
    if config is None or pruned_mode(trace, config) == protocol.PRUNED_ABORT:
        return finish_reason
    tokens = meta_info["completion_tokens"]
    return {"type": "length", "length": tokens, "message": finish_reason["message"]}
