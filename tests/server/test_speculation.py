"""Speculative decoding: accepted tokens are scored once, rejected ones never; memory comes back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from step_sglang.reasoner import model_path, scorer_path
from step_sglang.training.confidence import token_signals
from tests.models import build_eagle_draft
from tests.server.expected import assert_scores
from tests.server.idle import free_tokens, step_state
from tests.server.launch import Server, one_core_each, serve
from tests.server.traces import assert_same_victims

pytestmark = pytest.mark.server

QUESTION = "5;A*3;B+8;C*6;D-2;E+5\n\n"
TRACES, NEW_TOKENS, POOL = 64, 300, 1600
NGRAM = ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "6")
TREES = ("--speculative-ngram-max-bfs-breadth", "3")
CHAINS = ("--speculative-ngram-max-bfs-breadth", "1")
DRAFTS = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1",
          "--speculative-num-draft-tokens", "4")  # fmt: skip
STANDALONE = ("--speculative-algorithm", "STANDALONE", *DRAFTS)
PAGES = ("--page-size", "16", "--chunked-prefill-size", "16")


@dataclass(frozen=True)
class Speculating:
    """A server with a draft, and what it serves."""

    server: Server
    model: Path
    scorer: Path
    accepts: bool  # its drafts are worth something
    name: str

    def ask(self, n: int, **sampling: object) -> list[dict]:
        """Answers to one group."""
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        answers = self.server.generate(
            input_ids=self.prompt(),
            sampling_params={
                "n": n,
                "temperature": 1.0,
                "max_new_tokens": NEW_TOKENS,
                "stop_token_ids": [tokenizer.eos_token_id],
                **sampling,
                "custom_params": {"step": {"group": "g", "step_scores": True}},
            },
        )
        return answers if isinstance(answers, list) else [answers]

    def prompt(self) -> list[int]:
        """The question's tokens."""
        return list(AutoTokenizer.from_pretrained(self.model).encode(QUESTION))


CONFIGURATIONS = {
    "ngram-trees": (*NGRAM, *TREES),
    "ngram-pages-retract": (*NGRAM, *CHAINS, *PAGES),
    "ngram-two-ranks": (*NGRAM, *TREES, "--tp-size", "2"),
    "standalone-pages": (*STANDALONE, *PAGES),
    "eagle": ("--speculative-algorithm", "EAGLE", *DRAFTS),
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name == "ngram-trees" else pytest.mark.full)
        for name in CONFIGURATIONS
    ],
)
def speculating(
    request: pytest.FixtureRequest,
    models: dict[str, Path],
    scorer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Speculating]:
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    model, its_scorer, flags, env = model_path(), scorer_path(), CONFIGURATIONS[name], {}
    if name == "eagle":
        model, its_scorer = models["llama"], scorer
        draft = ("--speculative-draft-model-path", str(build_eagle_draft(folder / "draft", model)))
    else:
        draft = ("--speculative-draft-model-path", str(model)) if "standalone" in name else ()
    if name.endswith("retract"):
        env["SGLANG_TEST_RETRACT"] = "1"
    if name.endswith("ranks"):
        env["SGLANG_CPU_OMP_THREADS_BIND"] = one_core_each()
    with serve(
        model,
        *("--enable-step", "--step-scorer", str(its_scorer), "--max-total-tokens", str(POOL)),
        *("--max-running-requests", "64", *flags, *draft),
        log=folder / "server.log",
        **env,
    ) as server:
        yield Speculating(server, model, its_scorer, name != "eagle", name)


def test_every_accepted_token_is_scored_once(speculating: Speculating) -> None:
    before = free_tokens(speculating.server)
    answers = speculating.ask(TRACES)
    prompt = speculating.prompt()
    steps = sum(
        assert_scores(speculating.model, speculating.scorer, prompt, answer) for answer in answers
    )
    pruned = [answer["meta_info"]["step"]["pruned"] for answer in answers]
    assert 0 < sum(pruned) < TRACES
    assert steps > TRACES
    infos = [answer["meta_info"] for answer in answers]
    retracted = sum(info["num_retractions"] for info in infos)
    assert (retracted > 0) is speculating.name.endswith("retract")
    # SGLang says it of those alone that verified any: some are pruned before.
    correct = sum(info.get("spec_num_correct_drafts", 0) for info in infos)
    tokens = sum(info["completion_tokens"] for info in infos)
    if speculating.accepts:
        # Steps end among accepted drafts too: a tenth of all tokens are, and of all steps.
        assert correct > tokens / 10
    else:
        assert correct < tokens / 10
    assert free_tokens(speculating.server) == before
    said = step_state(speculating.server)
    assert said["passes_lost"] == said["steps_unscored"] == 0
    assert said["failures"] == {}


def test_a_greedy_text_is_the_models_own(speculating: Speculating) -> None:
    (answer,) = speculating.ask(1, temperature=0)
    prompt, output = speculating.prompt(), answer["output_ids"]
    assert_scores(speculating.model, speculating.scorer, prompt, answer)
    reference = AutoModelForCausalLM.from_pretrained(speculating.model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    torch.testing.assert_close(chosen, logits.max(1).values, rtol=0, atol=1e-4)


def test_a_trace_is_pruned_in_the_middle_of_a_round(speculating: Speculating) -> None:
    """Its text ends where memory was short, whatever drafts were under way."""
    answers = speculating.ask(TRACES)
    assert any(answer["meta_info"]["step"]["pruned"] for answer in answers)
    for answer in answers:
        info = answer["meta_info"]
        assert info["completion_tokens"] == len(answer["output_ids"])
        if info["step"]["pruned"]:
            assert info["finish_reason"]["message"].startswith("pruned by STEP")
    if speculating.name.endswith("ranks"):
        assert_same_victims(speculating.server, at_least=8)


def test_confidences_are_those_of_the_committed_tokens(speculating: Speculating) -> None:
    if speculating.name.endswith("ranks"):
        pytest.skip("a baseline that judges every token is refused with more than one rank")
    answer = speculating.server.generate(
        input_ids=speculating.prompt(),
        sampling_params={
            "temperature": 0,
            "max_new_tokens": 60,
            "custom_params": {"step": {"baseline": {"name": "deepconf", "window": 20}}},
        },
        return_logprob=True,
        top_logprobs_num=20,
    )
    info = answer["meta_info"]
    expected = [
        -math.fsum(entry[0] for entry in top) / len(top) for top in info["output_top_logprobs"]
    ]
    signals = token_signals([0.0] * len(expected), expected, 20)
    assert info["step"]["confidence"] == pytest.approx(signals.lowest_confidence[-1], abs=1e-4)
