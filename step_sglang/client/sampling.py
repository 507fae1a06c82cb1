"""How traces are sampled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """SGLang's sampling parameters; the defaults are the paper's for Qwen and DeepSeek."""

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20  # -1 = off
    max_new_tokens: int = 32768
