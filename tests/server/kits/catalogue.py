"""Which of SGLang's kits run here, against which server, and which are the quick ones.

A kit that is not in this table needs more than a CPU and a small random model;
docs/compatibility.md lists those with the reason.
"""

from __future__ import annotations

import json
import tempfile
import unittest
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from sglang.test.kits.abort_timeout_kit import (
    AbortAllMixin,
    RunningTimeoutTwoWaveMixin,
    WaitingTimeoutMixin,
)
from sglang.test.kits.anthropic_messages_kit import AnthropicMessagesMixin
from sglang.test.kits.basic_api_contract_kit import BasicAPIContractMixin
from sglang.test.kits.basic_decode_correctness_kit import BasicDecodeCorrectnessMixin
from sglang.test.kits.basic_scheduler_stress_kit import BasicSchedulerStressMixin
from sglang.test.kits.cache_hit_kit import run_multiturn_cache_hit_test
from sglang.test.kits.ebnf_constrained_kit import EBNFConstrainedMixin
from sglang.test.kits.json_constrained_kit import JSONConstrainedMixin
from sglang.test.kits.json_mode_kit import JSONModeMixin
from sglang.test.kits.matched_stop_kit import MatchedStopMixin
from sglang.test.kits.pause_generation_kit import PauseResumeInPlaceMixin
from sglang.test.kits.prefix_cache_branching_kit import PrefixCacheBranchingMixin
from sglang.test.kits.radix_cache_server_kit import run_radix_attention_test
from sglang.test.kits.regex_constrained_kit import RegexConstrainedMixin
from sglang.test.kits.spec_server_kits import (
    SpecCorrectnessKit,
    SpecFeatureKit,
    SpecHiddenStatesKit,
    SpecLogprobKit,
    SpecPenaltyKit,
    SpecSamplingMaskKit,
)
from sglang.test.kits.streaming_session_kit import (
    AbortLeakReproKitMixin,
    StreamingSessionKitMixin,
)
from sglang.test.server_fixtures.spec_eagle_fixture import SpecEagleServerBase
from transformers import AutoTokenizer

from tests.server.launch import Server


class RadixCacheServer:
    """The radix cache kit is a function."""

    def test_radix_attention(self: Any) -> None:
        run_radix_attention_test(self.base_url)


class MultiTurnCache:
    """So is that of cache hits over several turns; it draws its prompts from conversations."""

    def test_multiturn_cache_hit(self: Any) -> None:
        turns = [[{"value": f"{i}: why is {i * i} a square?"}, {"value": "So."}] for i in range(9)]
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump([{"conversations": turn} for turn in turns], file)
            file.flush()
            run_multiturn_cache_hit_test(
                self.base_url,
                self.model,
                num_clients=4,
                request_length=128,
                output_length=16,
                dataset_path=file.name,
            )


class WithFixture:
    """What SGLang's speculative kits call on their fixture; none of it needs speculation."""

    run_decode = SpecEagleServerBase.run_decode
    send_request = SpecEagleServerBase.send_request
    send_requests_abort = SpecEagleServerBase.send_requests_abort


@dataclass(frozen=True)
class Kit:
    """One of SGLang's mixins, and what it reads of its host class."""

    mixin: type
    quick: tuple[str, ...] = ()  # tests of the default run
    settings: dict[str, Any] = field(default_factory=dict)
    skip: tuple[str, ...] = ()

    def case(self, server: Server, model: Path, test: str) -> unittest.TestCase:
        """The kit's test of that name, bound to a server."""

        def flush_cache() -> None:
            assert server.post("/flush_cache", {}).status_code == 200

        host = {
            "base_url": server.url,
            "process": server.process,
            "model": str(model),
            "api_key": "none",
            "tokenizer": AutoTokenizer.from_pretrained(model),
            "client": openai.OpenAI(base_url=f"{server.url}/v1", api_key="none"),
            "flush_cache": staticmethod(flush_cache),
            **self.settings,
        }
        kind = type(self.mixin.__name__, (self.mixin, WithFixture, unittest.TestCase), host)
        return kind(test)

    def tests(self, *, quick: bool) -> list[str]:
        """Names of its tests."""
        if quick:
            return list(self.quick)
        kind = type("Names", (self.mixin, unittest.TestCase), {})
        names = unittest.defaultTestLoader.getTestCaseNames(kind)
        return [name for name in names if name not in self.skip]


@dataclass(frozen=True)
class Setup:
    """A server's flags and environment, and the kits that run against it."""

    kits: tuple[Kit, ...]
    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


MAIN = Setup(
    (
        Kit(
            BasicAPIContractMixin,
            (
                "test_get_model_info",
                "test_get_server_info",
                "test_health_generate",
                "test_openai_chat_completion",
                "test_openai_completion",
            ),
        ),
        Kit(BasicDecodeCorrectnessMixin, ("test_determinism_temp_zero", "test_max_token_one")),
        Kit(BasicSchedulerStressMixin),
        Kit(
            AbortAllMixin,
            ("test_abort_all",),
            {"abort_all_num_requests": 16, "abort_all_max_new_tokens": 2000},
        ),
        Kit(
            PauseResumeInPlaceMixin,
            ("test_pause_resume_in_place",),
            # The same paths in less time; long enough to be still running after a second.
            {
                "pause_duration": 2,
                "pause_ignore_eos": True,
                "pause_num_requests": 8,
                "pause_max_new_tokens": 1024,
            },
        ),
        Kit(MatchedStopMixin, ("test_finish_length",)),
        Kit(RadixCacheServer),
        Kit(MultiTurnCache, ("test_multiturn_cache_hit",)),
        Kit(PrefixCacheBranchingMixin, (), {"cache_chunk_size": 16}),
        Kit(
            RegexConstrainedMixin,
            ("test_regex_generate_date", "test_regex_generate_phone"),
        ),
        Kit(EBNFConstrainedMixin, ("test_ebnf_generate_phone",)),
        Kit(JSONConstrainedMixin, ("test_json_invalid",)),
        Kit(JSONModeMixin),
        Kit(
            AnthropicMessagesMixin,
            ("test_count_tokens", "test_error_empty_messages", "test_temperature"),
        ),
        Kit(
            StreamingSessionKitMixin,
            ("test_kv_cache_inheritance", "test_preabort_recovery"),
        ),
        Kit(SpecCorrectnessKit, ("test_batch_generation", "test_first_token_finish")),
        Kit(
            SpecLogprobKit,
            (
                "test_logprob_decode_match_prefill",
                "test_logprob_start_len",
                "test_token_ids_logprob_ragged",
            ),
        ),
        Kit(SpecPenaltyKit, ("test_penalty_mixed",)),
        # A random model never closes its JSON object, and nothing else bounds that one.
        Kit(SpecFeatureKit, skip=("test_constrained_decoding",)),
        Kit(SpecHiddenStatesKit, ("test_return_hidden_states",)),
        Kit(SpecSamplingMaskKit, ("test_sampling_mask",)),
    ),
    (
        *("--max-total-tokens", "49152", "--max-running-requests", "64"),
        *("--chunked-prefill-size", "2048", "--enable-streaming-session"),
        "--enable-return-hidden-states",
    ),
)
# The rest need a server of their own.
OTHERS = {
    "waiting timeout": Setup(
        (Kit(WaitingTimeoutMixin, settings={"waiting_timeout_max_new_tokens": 3000}),),
        ("--max-running-requests", "1"),
        {"SGLANG_REQ_WAITING_TIMEOUT": "0.001"},
    ),
    "running timeout": Setup(
        (Kit(RunningTimeoutTwoWaveMixin),),
        ("--max-running-requests", "64", "--max-total-tokens", "24000"),
        {"SGLANG_REQ_RUNNING_TIMEOUT": "3"},
    ),
    "abort leak": Setup(
        (Kit(AbortLeakReproKitMixin),),
        (
            *("--context-length", "512", "--page-size", "256", "--enable-streaming-session"),
            *("--chunked-prefill-size", "4096", "--max-total-tokens", "24064"),
        ),
    ),
}
