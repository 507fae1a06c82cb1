"""Which tests a worker runs together."""

from __future__ import annotations

from tests.conftest import group_of


def test_tests_of_a_server_are_together() -> None:
    server = "tests/server"
    together = (
        (f"{server}/test_api.py::test_a", f"{server}/test_fuzz.py::test_b[1]"),
        (f"{server}/test_groups.py::test_a", f"{server}/test_groups.py::test_b"),
        (f"{server}/answers/test_ask.py::test_a", f"{server}/answers/test_client.py::test_b"),
        (f"{server}/test_pruning.py::test_a[llama]", f"{server}/test_pruning.py::test_b[llama]"),
    )
    assert len({group_of(one) for pair in together for one in pair}) == len(together)
    for one, other in together:
        assert group_of(one) == group_of(other)


def test_others_are_apart() -> None:
    apart = (
        *("tests/unit/test_op.py::test_a", "tests/unit/test_op.py::test_b"),
        *(
            "tests/server/test_pruning.py::test_a[llama]",
            "tests/server/test_pruning.py::test_a[qwen3]",
        ),
        *("tests/server/test_groups.py::test_a", "tests/server/test_ranks.py::test_a"),
    )
    assert len({group_of(test) for test in apart}) == len(apart)
