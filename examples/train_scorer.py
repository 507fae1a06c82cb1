"""From questions to a scorer of the embedded reasoner, in a few minutes on a CPU.

`step-sglang collect` and `step-sglang train` do the same for any model; every choice is
a flag.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from step_sglang.client.launch import capture_flags, running_server
from step_sglang.client.sampling import Sampling
from step_sglang.data.questions import load_questions
from step_sglang.reasoner import model_path
from step_sglang.training.collect import CollectSettings, collect
from step_sglang.training.fit import Recipe
from step_sglang.training.metrics import means_by_signal
from step_sglang.training.prompts import load_prompter
from step_sglang.training.store import Writer
from step_sglang.training.stored import StoreMeta
from step_sglang.training.train import train_scorer


def main() -> None:
    """Collect traces with their hidden states, train on them, show how well the scorer ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the traces and the scorer")
    parser.add_argument("-n", type=int, default=8, help="traces of a question")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--url", help="a server with --step-capture, instead of a new one")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    store, model = options.out / "traces", str(model_path())

    delimiters = ("\n\n",)
    questions = load_questions("reasoner:train", options.questions)
    prompter = load_prompter(model, delimiters)
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=900)
    meta = StoreMeta(
        "reasoner", prompter.hidden_size, options.n, questions.name, delimiters=delimiters
    )
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(Writer(store, meta))
        url = options.url or stack.enter_context(
            running_server(model, capture_flags(delimiters, False), options.out / "server.log")
        )
        done = collect(url, writer, questions.jobs, prompter, CollectSettings(sampling))
    print(f"{done.questions} questions, {done.traces} traces, {done.correct} of them correct")

    trained = train_scorer(store, options.out / "scorer", Recipe())
    for signal, auc in means_by_signal(trained.test.ranking, 1.0).items():
        print(f"{signal}: AUC {auc:.3f} within a question")
    print(f"wrote {trained.scorer}")


if __name__ == "__main__":
    main()
