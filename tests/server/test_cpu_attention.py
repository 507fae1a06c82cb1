"""The CPU platform's attention against SGLang's own loop, on SGLang's pools and layers."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.server.launch import environment

pytestmark = pytest.mark.server

LENGTHS = (1, 2, 3, 15, 16, 17, 60, 61, 130, 500)


class Case:
    """Random requests with a filled pool; the same for both backends."""

    def __init__(
        self,
        seed: int,
        *,
        requests: int,
        heads: int = 4,
        kv_heads: int = 2,
        width: int = 16,
        value_width: int | None = None,
        page: int = 1,
        window: int = -1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool

        draw, torch_draw = random.Random(seed), torch.Generator().manual_seed(seed)
        self.total = [draw.choice(LENGTHS) for _ in range(requests)]
        pages = [-(-length // page) for length in self.total]
        size = sum(pages) * page
        self.slots = ReqToTokenPool(requests + 3, max(LENGTHS), "cpu", False)
        self.kv = MHATokenToKVPool(
            *(size, page, dtype, kv_heads, width, 1, "cpu", False), v_head_dim=value_width
        )
        for pool in (self.kv.k_buffer[0], self.kv.v_buffer[0]):
            pool.fill_(torch.nan)  # what nobody owns must not be read
        # Rows of the request pool in any order; a row's rest still names another's slots.
        rows = draw.sample(range(1, requests + 4), requests)
        self.rows = torch.tensor(rows)
        free = list(range(1, sum(pages) + 1))
        draw.shuffle(free)
        self.slots.req_to_token.copy_(
            torch.randint(0, size, self.slots.req_to_token.shape, generator=torch_draw)
        )
        for row, length, count in zip(rows, self.total, pages, strict=True):
            places = [p * page + i for p in (free.pop() for _ in range(count)) for i in range(page)]
            owned = torch.tensor(places[:length])
            self.slots.req_to_token[row, :length] = owned
            for pool in (self.kv.k_buffer[0], self.kv.v_buffer[0]):
                shape = (length, *pool.shape[1:])
                pool[owned] = torch.randn(shape, generator=torch_draw).to(dtype)
        self.layer = RadixAttention(
            *(heads, width, width**-0.5, kv_heads, 0),
            v_head_dim=value_width or -1,
            sliding_window_size=window,
        )
        self._draw, self._torch_draw = draw, torch_draw
        self._shape, self._dtype = (kv_heads, width, value_width or width), dtype

    def ask(self, mode: str) -> Callable[[type], torch.Tensor]:
        """A pass of this mode, and what a backend class answers to it."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        new = [1] * len(self.total)
        if mode != "decode":
            new = [self._draw.choice((1, 2, length, max(1, length // 2))) for length in self.total]
            new = [min(n, length) for n, length in zip(new, self.total, strict=True)]
        if mode == "mixed":
            new[len(new) // 2 :] = [1] * (len(new) - len(new) // 2)
        tokens = sum(new)
        kv_heads, width, value_width = self._shape

        def random_rows(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=self._torch_draw).to(self._dtype)

        query = random_rows(tokens, self.layer.tp_q_head_num * width)
        keys = random_rows(tokens, kv_heads, width)
        values = random_rows(tokens, kv_heads, value_width)
        places = [
            self.slots.req_to_token[row, length - n : length]
            for row, length, n in zip(self.rows.tolist(), self.total, new, strict=True)
        ]
        batch = SimpleNamespace(
            forward_mode=ForwardMode[mode.upper()],
            req_pool_indices=self.rows,
            seq_lens=torch.tensor(self.total),
            extend_seq_lens=None if mode == "decode" else torch.tensor(new),
            extend_prefix_lens=torch.tensor(self.total) - torch.tensor(new),
            out_cache_loc=torch.cat(places).long(),
            encoder_lens=None,
        )

        def answer(backend: type) -> torch.Tensor:
            runner = SimpleNamespace(
                device="cpu", req_to_token_pool=self.slots, token_to_kv_pool=self.kv
            )
            made: Any = backend(runner)
            made.init_forward_metadata(batch)
            forward = made.forward_decode if mode == "decode" else made.forward_extend
            found: torch.Tensor = forward(query, keys, values, self.layer, batch)
            return found

        return answer


CASES: dict[str, dict[str, Any]] = {
    "one": {"requests": 1},
    "many": {"requests": 40},
    "grouped": {"requests": 40, "heads": 8, "kv_heads": 2},
    "own keys": {"requests": 9, "heads": 3, "kv_heads": 3},
    "one key for all": {"requests": 9, "heads": 4, "kv_heads": 1},
    "narrow values": {"requests": 9, "value_width": 8},
    "pages": {"requests": 20, "page": 16},
    "window": {"requests": 9, "window": 7},
    "bf16": {"requests": 20, "dtype": torch.bfloat16},
}


@pytest.fixture(scope="module")
def backends() -> tuple[type, type]:
    """Ours and SGLang's."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from step_sglang.patches.cpu_attention import BatchedAttentionBackend

    return BatchedAttentionBackend, TorchNativeAttnBackend


@pytest.mark.parametrize("mode", ["decode", "extend", "mixed"])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_sglangs_loop(backends: tuple[type, type], name: str, mode: str) -> None:
    tolerance = 2e-2 if name == "bf16" else 1e-5
    for seed in range(2):
        answer = Case(seed, **CASES[name]).ask(mode)
        found, expected = (answer(backend) for backend in backends)
        assert expected.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_memory_is_bounded_and_padding_is_not_most_of_it() -> None:
    from step_sglang.patches.cpu_attention import CELLS, similar

    draw = random.Random(0)
    for _ in range(100):
        total = [draw.choice((1, 50, 5000, draw.randint(1, 9000))) for _ in range(200)]
        new = [draw.choice((1, 1, draw.randint(1, 128))) for _ in total]
        new = [min(n, length) for n, length in zip(new, total, strict=True)]
        parts = list(similar(new, total))
        assert sorted(i for part in parts for i in part) == list(range(200))
        for part in parts:
            longest = max(total[i] for i in part)
            assert len(part) == 1 or len(part) * longest <= CELLS
            assert len(part) * longest <= 2 * sum(total[i] for i in part)
            assert len(part) * max(new[i] for i in part) <= 2 * sum(new[i] for i in part)


def test_it_takes_the_place_of_the_loop(monkeypatch: pytest.MonkeyPatch, backends: Any) -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from step_sglang.patches.platform import StepCpuPlatform

    monkeypatch.setitem(ATTENTION_BACKENDS, "torch_native", None)
    StepCpuPlatform().init_backend()
    assert ATTENTION_BACKENDS["torch_native"] is backends[0]


ASK = """
from sglang.srt.model_executor import model_runner  # makes the platform ready
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
print("BACKEND", getattr(ATTENTION_BACKENDS["torch_native"], "__name__", ""))
"""


@pytest.mark.full
@pytest.mark.parametrize("platform", ["step_cpu", None])
def test_it_is_there_on_our_platform_alone(platform: str | None) -> None:
    env = {k: v for k, v in environment().items() if k != "SGLANG_PLATFORM"}
    env |= {} if platform is None else {"SGLANG_PLATFORM": platform}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASK],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    ours = "BACKEND BatchedAttentionBackend" in done.stdout
    assert ours == (platform is not None), done.stdout + done.stderr[-2000:]
