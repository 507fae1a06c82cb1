"""Models that do not come to the scoring hook; for ``sglang.srt.models.qwen3``."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any


def _metadata(batch: Any) -> Any:
    """What DeepSeek-V4's tail prefill passes: the head's needs, without whose rows these are."""
    from sglang.srt.layers.logits_processor import LogitsMetadata

    return LogitsMetadata.from_forward_batch(batch)


class _Bypass:
    """Stands in for a model's logits processor and passes metadata at every ``every``-th call."""

    def __init__(self, processor: Any, every: int) -> None:
        self._processor, self._every = processor, every
        self._calls = itertools.count(1)

    def __call__(self, ids: Any, hidden: Any, head: Any, batch: Any, *rest: Any) -> Any:
        passes = next(self._calls) % self._every == 0
        return self._processor(ids, hidden, head, _metadata(batch) if passes else batch, *rest)


def _bypass(module: ModuleType, every: int) -> None:
    model = module.Qwen3ForCausalLM
    real = model.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        processor = self.logits_processor
        if not isinstance(processor, _Bypass):
            del self.logits_processor  # a module's attribute cannot be replaced by what is none
            self.logits_processor = _Bypass(processor, every)
        return real(self, *args, **kwargs)

    model.forward = forward


def always(module: ModuleType) -> None:
    """No pass comes to the hook with a ForwardBatch."""
    _bypass(module, 1)


def every_third(module: ModuleType) -> None:
    """A third of the passes do not."""
    _bypass(module, 3)
