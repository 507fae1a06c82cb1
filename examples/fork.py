"""A program of SGLang's frontend language: the forks of one `fork(n)` are a group, and vote."""

from __future__ import annotations

import argparse
from typing import Any

import sglang as sgl

from step_sglang.client.frontend import endpoint, vote


@sgl.function
def solve(s: Any, question: str, num_forks: int) -> None:
    """Ask once, answer num_forks times; the program's state keeps the winner."""
    s += sgl.user(question)
    forks = s.fork(num_forks)
    forks += sgl.assistant(sgl.gen("answer", max_tokens=900, temperature=1.0))
    s["vote"] = vote(forks, "answer")


def main() -> None:
    """Run the program on a server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question")
    parser.add_argument("-n", type=int, default=16, help="forks")
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="with --enable-step")
    options = parser.parse_args()
    sgl.set_default_backend(endpoint(options.url))

    found = solve.run(question=options.question, num_forks=options.n)["vote"]
    for answer in found.answers:
        print(f"{answer.answer}: forks {answer.members}, weight {answer.weight:.2f}")
    print(f"answer: {found.answer} of fork {found.fork}, {found.share:.0%} of the weight")


if __name__ == "__main__":
    main()
