"""Embeds the text of a step as a unit vector, for methods that compare thoughts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from step_sglang.errors import ConfigError, first_line
from step_sglang.protocol import NGRAMS

DIMENSIONS = 1024  # of the bag of n-grams
_ORDERS = (1, 2)

# Token ids of a step -> [D] fp32, of length 1 (or 0 for a step without tokens).
Embedding = Callable[[Sequence[int]], NDArray[np.float32]]


def load_embedding(name: str, decode: Callable[[Sequence[int]], str]) -> Embedding:
    """An embedding by name.

    Args:
        name: ``ngrams``, a bag of the step's token n-grams that needs nothing; or a
            sentence-transformers model, by name or path.
        decode: the tokenizer's, for models that read text.

    Raises:
        ConfigError: sentence-transformers is not installed, or cannot load the model.
    """
    if name == NGRAMS:
        return ngrams
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(
            f"--step-embedding {name} needs `pip install sentence-transformers`; "
            f"{NGRAMS} needs nothing"
        ) from error
    try:
        model = SentenceTransformer(name, device="cpu")  # the accelerator's memory is the pool's
    except Exception as error:
        raise ConfigError(f"--step-embedding: cannot load {name}: {first_line(error)}") from error

    def embed(step: Sequence[int]) -> NDArray[np.float32]:
        vector: NDArray[np.float32] = model.encode(
            decode(step), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        return vector.astype(np.float32)

    return embed


def ngrams(step: Sequence[int]) -> NDArray[np.float32]:
    """Hashed counts of the step's token 1-grams and 2-grams, [1024]."""
    vector = np.zeros(DIMENSIONS, np.float32)
    for order in _ORDERS:
        for start in range(len(step) - order + 1):
            gram = ",".join(map(str, step[start : start + order]))
            vector[crc32(gram.encode()) % DIMENSIONS] += 1
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector
