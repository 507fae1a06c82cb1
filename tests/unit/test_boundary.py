"""Boundary tokens are found by scanning the tokenizer, merged tokens included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_sglang.errors import BoundaryError
from step_sglang.scoring.boundary import bitmap, boundary_ids, think_end_id
from tests.models import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_merged_tokens_count(tokenizer) -> None:
    ids = boundary_ids(tokenizer, ["\n\n"])
    texts = [tokenizer.decode([i]) for i in ids]
    assert "\n\n" in texts and ".\n\n" in texts
    assert all("\n\n" in text for text in texts)
    others = set(range(len(tokenizer))) - set(ids)
    assert not any("\n\n" in tokenizer.decode([i]) for i in others)


def test_several_delimiters(tokenizer) -> None:
    both = boundary_ids(tokenizer, ["\n\n", "!"])
    assert set(both) == set(boundary_ids(tokenizer, ["\n\n"])) | set(boundary_ids(tokenizer, ["!"]))


def test_a_delimiter_that_no_token_contains(tokenizer) -> None:
    with pytest.raises(BoundaryError, match=r"no token .* '§§§§'.*--step-delimiter"):
        boundary_ids(tokenizer, ["§§§§"])


def test_think_end(tokenizer) -> None:
    assert think_end_id(tokenizer) == tokenizer.convert_tokens_to_ids("</think>")
    assert think_end_id(tokenizer, "two words") is None


@given(st.sets(st.integers(0, 5000), min_size=1))
def test_bitmap_holds_exactly_the_ids(ids: set[int]) -> None:
    words = bitmap(sorted(ids))
    assert words.dtype == torch.int32 and len(words) == max(ids) // 32 + 1
    found = {
        w * 32 + b for w, word in enumerate(words.tolist()) for b in range(32) if word >> b & 1
    }
    assert found == ids
