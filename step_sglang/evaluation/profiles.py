"""How each model is sampled, as its paper does; and the embedded reasoner's own measure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from step_sglang.client.sampling import Sampling
from step_sglang.reasoner import NAME, NAME_DWELLING, scorer_path
from step_sglang.training.setup import REASONER_SAMPLING


@dataclass(frozen=True)
class Profile:
    """Defaults that depend on the model."""

    sampling: Sampling = field(default_factory=Sampling)  # the paper's for Qwen and DeepSeek
    window: int = 2048  # tokens of a DeepConf group
    delay: int = 20  # steps before Slim-SC compares a trace
    scorer: str | None = None
    mean_tokens: int | None = None  # of a trace, where it is known
    prompt_tokens: int = 0


# Its traces are 238 tokens and 17 steps long at the mean (its card), where a language model's have
# ten thousand tokens and more: windows and delays shrink with them.
_REASONER = Profile(
    REASONER_SAMPLING, window=20, delay=5, scorer=str(scorer_path()),
    mean_tokens=238, prompt_tokens=52,
)  # fmt: skip
# The same task: wrong traces go on looking back.
_DWELLING = replace(_REASONER, scorer=str(scorer_path(NAME_DWELLING)), mean_tokens=265)
_PHI = Profile(Sampling(0.8, 0.95, 50))


def profile_of(model: str) -> Profile:
    """The profile of a model by its name, an embedded reasoner's too."""
    if model in (NAME, NAME_DWELLING):
        return _REASONER if model == NAME else _DWELLING
    return _PHI if "phi-4" in model.lower() else Profile()
