"""What related traces weigh together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_sglang.voting.families import Lineage, lineage_of, weight_together


def star(number: int, shared: int, steps: int) -> list[Lineage]:
    """Branches of one trace at the same step."""
    return [Lineage((("root", shared), (f"t{i}", steps))) for i in range(number)]


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[float, Lineage]]:
    """Traces of a tree, each with a weight."""
    traces = [Lineage(((f"r{i}", draw(st.integers(1, 20))),)) for i in range(2)]
    for number in range(draw(st.integers(0, 6))):
        parent = draw(st.sampled_from(traces))
        *before, (name, steps) = parent.path
        least = before[-1][1] if before else 1
        cut = draw(st.integers(min(least, steps), steps))
        end = cut + draw(st.integers(0, 10))
        traces.append(Lineage((*before, (name, cut), (f"t{number}", end))))
    return [(draw(st.floats(0, 1)), trace) for trace in draw(st.permutations(traces))]


def test_strangers_weigh_the_sum() -> None:
    voters = [(0.3, Lineage(((f"r{i}", 9),))) for i in range(4)]
    assert weight_together(voters) == pytest.approx(1.2)
    assert weight_together([(0.25, None), (0.5, None)]) == pytest.approx(0.75)
    assert weight_together([]) == 0.0


@pytest.mark.parametrize("number", [2, 3, 8, 40])
@pytest.mark.parametrize("shared", [1, 5, 9])
def test_siblings_weigh_by_the_design_effect(number: int, shared: int) -> None:
    rho = shared / 10
    together = weight_together([(0.6, trace) for trace in star(number, shared, 10)])
    assert together == pytest.approx(0.6 * number / (1 + (number - 1) * rho))
    assert together < 0.6 / rho


def test_the_same_text_is_one_voice() -> None:
    same = [Lineage((("root", 10), (f"t{i}", 10))) for i in range(3)]
    assert weight_together([(0.7, trace) for trace in same]) == pytest.approx(0.7, abs=1e-6)
    # Of a strong and a weak one with the same text, the strong one counts.
    assert weight_together([(0.9, same[0]), (0.1, same[1])]) == pytest.approx(0.9, abs=1e-6)


@given(trees(), st.data())
def test_one_more_never_takes_away_and_adds_no_more_than_its_own(voters, data) -> None:
    *others, (weight, trace) = voters
    before, after = weight_together(others), weight_together([*others, (weight, trace)])
    assert before - 1e-5 <= after <= before + weight + 1e-5


@given(trees())
def test_it_is_the_best_precision_of_a_weighted_mean(voters) -> None:
    """By random weightings, none of which does better."""
    voters = [(max(w, 0.01), t) for w, t in voters if t.path[0][0] == "r0"]
    if not voters:
        return
    roots = np.sqrt([w for w, _ in voters])
    matrix = np.array([[a.correlation(b) for _, b in voters] for _, a in voters])
    np.fill_diagonal(matrix, 1.0)
    assert np.linalg.eigvalsh(matrix).min() > -1e-9  # correlations along a tree
    matrix = matrix / np.outer(roots, roots)
    best = weight_together(voters)
    draw = np.random.default_rng(0).exponential(size=(200, len(voters)))
    found = draw.sum(1) ** 2 / np.einsum("ni,ij,nj->n", draw, matrix, draw)
    assert found.max() <= best + 1e-4


def test_lineages_of_no_tree_weigh_too_little_not_nothing() -> None:
    """A matrix that cannot be solved, as no tree has it."""
    odd = [Lineage((("a", 3),)), *(Lineage((("a", 3), (f"t{i}", i))) for i in (2, 6))]
    matrix = np.array([[a.correlation(b) for b in odd] for a in odd])
    assert np.linalg.eigvalsh(matrix).min() < -1e-3
    for weights in ((0.5, 0.5, 0.5), (0.9, 0.1, 0.4)):
        together = weight_together(list(zip(weights, odd, strict=True)))
        assert max(weights) - 1e-9 <= together <= sum(weights)


def test_a_search_that_does_not_end_costs_no_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: object) -> None:
        raise RuntimeError("Maximum number of iterations reached.")

    voters = [(0.6, trace) for trace in star(8, 5, 10)]
    known = weight_together(voters)
    monkeypatch.setattr("scipy.optimize.nnls", endless)
    assert weight_together(voters) == pytest.approx(known)  # of equals, the plain mean is the best


@given(trees())
def test_the_order_does_not_matter(voters) -> None:
    assert weight_together(voters) == pytest.approx(weight_together(voters[::-1]), abs=1e-5)


def test_lineages_of_responses() -> None:
    step = {"num_steps": 9, "score": 0.5}
    assert lineage_of({"id": "a"}) is None
    plain = lineage_of({"id": "a", "step": step})
    branch = {"parent": "a", "position": 50, "depth": 1, "name": "b/1", "lineage": [["a", 4]]}
    child = lineage_of({"id": "b", "step": {**step, "branch": branch}})
    assert plain is not None and child is not None
    assert plain.shared(child) == child.shared(plain) == 4
    # The place's next trace is another one, though its request is the same.
    other = lineage_of({"id": "b", "step": step})
    assert other is not None and other.shared(child) == 0


@given(st.data())
def test_a_branch_that_ended_with_fewer_steps_than_it_shares(data) -> None:
    """Its first pass, which scores the last shared step again, gave no score."""

    def response(name: str, lineage: list[list], steps: int) -> dict:
        branch = {"parent": "", "position": 1, "depth": 1, "name": name, "lineage": lineage}
        step = {"num_steps": steps, "score": 0.5, **({"branch": branch} if lineage else {})}
        return {"id": name, "step": step}

    root = data.draw(st.integers(0, 12))
    traces: list[tuple[str, list[list], int]] = [("root", [], root)]
    for number in range(data.draw(st.integers(1, 8))):
        parent, lineage, steps = data.draw(st.sampled_from(traces))
        least = lineage[-1][1] if lineage else 1
        ends = data.draw(st.integers(least, max(least, steps)))
        own = data.draw(st.integers(max(0, ends - 2), ends + 4))
        traces.append((f"t{number}", [*lineage, [parent, ends]], own))
    voters = [(data.draw(st.floats(0, 1)), lineage_of(response(*trace))) for trace in traces]
    found = [lineage for _, lineage in voters if lineage is not None]
    matrix = np.array([[a.correlation(b) for b in found] for a in found])
    np.fill_diagonal(matrix, 1.0)
    assert np.linalg.eigvalsh(matrix).min() > -1e-9
    *others, (weight, lineage) = voters
    before, after = weight_together(others), weight_together([*others, (weight, lineage)])
    assert before - 1e-5 <= after <= before + weight + 1e-5


def test_nothing_is_shared_beyond_a_branchs_own_end() -> None:
    branch = {"name": "c/2", "lineage": [["a", 3], ["b/1", 7]]}
    found = [
        lineage_of({"id": "c", "step": {"num_steps": steps, "score": 0.5, "branch": branch}})
        for steps in (9, 6, 2)
    ]
    assert [lineage and lineage.path for lineage in found] == [
        (("a", 3), ("b/1", 7), ("c/2", 9)),
        (("a", 3), ("b/1", 6), ("c/2", 6)),
        (("a", 2), ("b/1", 2), ("c/2", 2)),
    ]
