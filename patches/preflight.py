"""Start-up checks in the main process, before anything is launched: refuse what cannot work."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from step_sglang import protocol
from step_sglang.config import DEFAULT_DELIMITERS, StepConfig
from step_sglang.errors import ConfigError, ScorerError, StepError
from step_sglang.gathering.folder import prepare
from step_sglang.patches import adapters, workers
from step_sglang.patches.endpoint import add_endpoints
from step_sglang.patches.server_args import config_of, refuse
from step_sglang.scoring.boundary import THINK_END, boundary_ids, think_end_id
from step_sglang.scoring.build import BuildError
from step_sglang.scoring.first_build import cuda_library
from step_sglang.scoring.locate import other_model
from step_sglang.scoring.scorer import Scorer, blank_scorer, load_scorer

logger = logging.getLogger(__name__)


def refuse_diffusion_pipelines(argv: Sequence[str]) -> None:
    """End ``sglang serve`` of an image or video pipeline with ``--enable-step``.

    That path has a parser of its own, so STEP's flags never reach the record checked below.
    """
    if "--enable-step" not in argv or "serve" not in argv[1:2]:
        return
    from sglang.cli.utils import get_is_diffusion_model, try_get_model_path

    path = try_get_model_path(list(argv[2:]))
    if path is not None and get_is_diffusion_model(path):
        raise SystemExit(
            f"step-sglang: {path} is a diffusion pipeline, which has no reasoning traces: "
            "leave --enable-step out"
        )


def launch_subprocesses(cls: type, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``Engine._launch_subprocesses``: runs for the HTTP server and for ``sgl.Engine``."""
    config = config_of(server_args)
    if config is None:
        return
    try:
        server_args.resolve_once()
        _check(server_args, config)
    except StepError as error:
        refuse(server_args, error)
    if server_args.tokenizer_worker_num > 1:
        workers.prepare()
    else:
        add_endpoints(config)


def refuse_unsupported(cfg: Any) -> None:
    """Refuse settings that do not work with STEP.

    Args:
        cfg: the raw record, before SGLang acts on the settings (it may itself fail on some of
            them, with other words); or its resolved view, as resolution can turn some on.

    Raises:
        ConfigError: names every such setting.
    """
    from sglang.srt.environ import envs

    refused = [
        text
        for wanted, text in (
            *_refused_speculation(cfg),
            (cfg.pp_size > 1, "pipeline parallelism (--pp-size above 1)"),
            (cfg.disaggregation_mode != "null", "prefill/decode disaggregation"),
            (cfg.encoder_only or cfg.language_only, "encoder disaggregation"),
            (cfg.dllm_algorithm is not None, "diffusion language models (--dllm-algorithm)"),
            (cfg.is_embedding, "embedding models (--is-embedding)"),
            (cfg.dwdp_size > 1, "data parallelism with distributed weights (--dwdp-size)"),
            (cfg.elastic_ep_backend is not None, "elastic expert parallelism"),
            (cfg.attn_cp_size > 1 or cfg.dcp_size > 1, "context parallelism"),
            (cfg.enable_pdmux, "prefill/decode multiplexing (--enable-pdmux)"),
            (cfg.enable_hisparse, "hierarchical sparse attention (--enable-hisparse)"),
            (cfg.enable_layernorm_sp, "sequence-parallel layer norm (--enable-layernorm-sp)"),
            (cfg.enable_encoder_swa_bounded_replay, "bounded sliding-window replay"),
            *_refused_host_cache(cfg),
            (
                cfg.enable_deterministic_inference,
                "deterministic inference (--enable-deterministic-inference): which trace is "
                "pruned depends on what else runs",
            ),
            (
                adapters.asked_for(cfg, "enable_nvidia_megakernel"),
                "the megakernel (--enable-nvidia-megakernel): it replaces the forward pass in "
                "which steps are scored",
            ),
            (
                cfg.enable_lmcache,
                "LMCache (--enable-lmcache): what it loads back is missing in the room that "
                "pruning makes",
            ),
            (
                cfg.enable_flexkv,
                "FlexKV (--enable-flexkv): what it loads back is missing in the room that "
                "pruning makes",
            ),
            (cfg.use_ray, "Ray (--use-ray)"),
            (
                cfg.tokenizer_worker_num > 1 and bool(cfg.api_key or cfg.admin_api_key),
                "API keys with several tokenizer workers (--tokenizer-worker-num): SGLang checks "
                "no key there",
            ),
            (cfg.smg_grpc_mode or cfg.grpc_mode, "gRPC mode"),
            (envs.SGLANG_RUST_SERVER.get(), "the Rust server (SGLANG_RUST_SERVER)"),
        )
        if wanted
    ]
    if refused:
        raise ConfigError(f"not supported with --enable-step: {'; '.join(refused)}")


def _refused_host_cache(cfg: Any) -> Iterator[tuple[bool, str]]:
    if not cfg.enable_hierarchical_cache:
        return
    name = "the hierarchical cache (--enable-hierarchical-cache) with"
    yield cfg.hicache_host_memory_mode != "cache", f"{name} --hicache-host-memory-mode buffer_only"
    yield cfg.hicache_write_policy == "write_back", f"{name} --hicache-write-policy write_back"
    yield cfg.hicache_storage_backend is not None, f"{name} a storage behind the host's memory"
    yield cfg.speculative_algorithm is not None, f"{name} speculative decoding"


# Their drafts are sampled by one function of SGLang, which is hooked.
_SPECULATION = ("NGRAM", "STANDALONE", "EAGLE", "EAGLE3", "NEXTN")


def _refused_speculation(cfg: Any) -> Iterator[tuple[bool, str]]:
    algorithm = cfg.speculative_algorithm
    if algorithm is None:
        return
    yield (
        algorithm not in _SPECULATION,
        f"speculative decoding by {algorithm} (--speculative-algorithm; supported: "
        f"{', '.join(_SPECULATION)})",
    )
    yield (
        cfg.attn_dp_size > 1 or cfg.enable_dp_attention,
        "speculative decoding with data-parallel attention: leave one of them out",
    )
    yield cfg.enable_multi_layer_eagle, "multi-layer EAGLE (--enable-multi-layer-eagle)"


def load_config_scorer(config: StepConfig, hidden_size: int, model: str = "") -> Scorer:
    """The server's scorer; a blank one where it has none, by which the op finds the boundaries.

    Raises:
        ScorerError: the file is wrong, or made for another hidden size.
    """
    if not config.scorer_file:
        return blank_scorer(hidden_size)
    scorer = load_scorer(config.scorer_file)
    if scorer.hidden_size != hidden_size:
        raise ScorerError(
            f"scorer {config.scorer}{_trained_for(scorer)} reads hidden states of size "
            f"{scorer.hidden_size}, but {model or 'the model'}'s are {hidden_size} wide: use a "
            "scorer trained for this model"
        )
    return scorer


def _trained_for(scorer: Scorer) -> str:
    return f" (of {scorer.info.model})" if scorer.info.model else ""


def step_delimiters(config: StepConfig, scorer: Scorer) -> tuple[str, ...]:
    """What ends a step: the flag's, else the scorer file's, else the default."""
    return config.delimiters or scorer.info.delimiters or DEFAULT_DELIMITERS


def step_boundaries(
    config: StepConfig, scorer: Scorer, tokenizer: Any
) -> tuple[list[int], int | None]:
    """Boundary ids, and the think-end id that stops scoring (None: everything is scored).

    Flags win over the scorer file, which wins over the defaults.
    """
    ids = boundary_ids(tokenizer, step_delimiters(config, scorer))
    if config.scores_all:
        return ids, None
    return ids, think_end_id(tokenizer, scorer.info.think_end or THINK_END)


def _check(server_args: Any, config: StepConfig) -> None:
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import resolving_view

    cfg = resolving_view(server_args)
    refuse_unsupported(cfg)
    _check_op(str(cfg.device))
    model_config = model_config_of(server_args)
    if not model_config.is_generation:
        raise ConfigError(
            "not supported with --enable-step: embedding, reward and classification models"
        )
    if config.refill != protocol.REFILL_OFF and cfg.speculative_algorithm is not None:
        raise ConfigError(
            f"not supported with --step-refill {config.refill}: speculative decoding: leave one of "
            "them out"
        )
    if config.refill != protocol.REFILL_OFF and cfg.strip_thinking_cache:
        raise ConfigError(
            f"not supported with --step-refill {config.refill}: --strip-thinking-cache: it frees "
            "text that branches share: leave one of them out"
        )
    if config.capture and cfg.speculative_algorithm is not None:
        raise ConfigError(
            "not supported with --step-capture: speculative decoding: collect without it, the "
            "text is the same"
        )
    width = model_config.hf_text_config.hidden_size
    scorer = load_config_scorer(config, width, str(cfg.model_path))
    _check_model(scorer, config, str(cfg.model_path), cfg.revision)
    step_boundaries(config, scorer, load_tokenizer(server_args))
    if config.sample:
        prepare(Path(config.sample), str(cfg.model_path))


def _check_model(scorer: Scorer, config: StepConfig, model: str, revision: str | None) -> None:
    """Warn of a scorer of another model: a quantized or copied one may be right all the same."""
    if not config.scorer or scorer.info.model is None:
        return
    found = other_model(scorer.info.model, scorer.info.revision, model, revision)
    if found is not None:
        logger.warning(
            "STEP: the scorer %s %s: its scores mean nothing unless these are the same weights, "
            "or nearly so",
            config.scorer,
            found,
        )


def _check_op(device: str) -> None:
    """Refuse to start without the op, before a scheduler is launched that would need it."""
    try:
        from step_sglang.scoring.op import has_cuda, load_cuda
    except (ImportError, OSError) as error:
        raise ConfigError(str(error)) from error
    kind = device.split(":", maxsplit=1)[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"STEP's op runs on cpu and cuda, not on device {device!r}")
    if kind == "cuda" and torch.version.hip is not None:
        raise ConfigError("STEP's op runs on NVIDIA GPUs and on the CPU; ROCm is not supported")
    if kind == "cuda" and not has_cuda():
        try:
            library = cuda_library(logger.warning)
            load_cuda(library)
        except (BuildError, OSError) as error:
            raise ConfigError(str(error)) from error
        os.environ[protocol.CUDA_LIBRARY_ENV] = str(library)  # for the schedulers


def load_tokenizer(server_args: Any) -> Any:
    """The model's tokenizer as SGLang loads it, also where the engine itself runs without one."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    cfg = resolving_view(server_args)
    return get_tokenizer(
        cfg.tokenizer_path or cfg.model_path,
        tokenizer_mode=cfg.tokenizer_mode,
        trust_remote_code=cfg.trust_remote_code,
        revision=cfg.revision,
        tokenizer_backend=cfg.tokenizer_backend,
    )
