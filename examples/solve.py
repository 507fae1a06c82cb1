"""One question, one voted answer: `python examples/solve.py "A=3;B=A*A;B" --url URL`."""

from __future__ import annotations

import argparse

import step_sglang


def main() -> None:
    """Ask, and show the vote."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question")
    parser.add_argument("-n", type=int, default=16, help="traces")
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="with --enable-step")
    options = parser.parse_args()

    result = step_sglang.solve(options.question, n=options.n, url=options.url)
    for answer in result.answers:
        print(f"{answer.answer}: {len(answer.traces)} traces, weight {answer.weight:.2f}")
    fates = [trace.fate.value for trace in result.traces]
    print(", ".join(f"{fates.count(fate)} {fate}" for fate in dict.fromkeys(fates)))
    print(f"answer: {result.answer} ({result.share:.0%} of the weight) {result.message}")


if __name__ == "__main__":
    main()
