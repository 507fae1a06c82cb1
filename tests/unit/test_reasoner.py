"""The embedded reasoner: its task, its tokenizer, its network, and the shipped model."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from step_sglang.reasoner import (
    NAME,
    NAME_DWELLING,
    Question,
    model_path,
    questions,
    scorer_path,
)
from step_sglang.reasoner.network import Reasoner, Shape, load
from step_sglang.reasoner.optimizer import orthogonalize
from step_sglang.reasoner.task import (
    BOUNDARY,
    CHECK_LAST,
    DWELLING,
    LOOK_BACK,
    SPLITS,
    Habits,
    final_answer,
    is_correct,
    parse_question,
    progress,
    question_stream,
    split_of,
    write_trace,
)
from step_sglang.reasoner.tokenizer import EOS, build_tokenizer, prompt_text
from step_sglang.reasoner.train import collate, save, weighted_loss
from step_sglang.scoring.scorer import load_scorer
from step_sglang.voting.suffix import default_suffix, reasoner_name

CAREFUL = Habits(wrong_multiple=(0.0,) * 6, wrong_when_negative=0.0, false_alarm=0.1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_splits_are_disjoint_and_reproducible() -> None:
    drawn = {split: questions(split, 200, seed=3) for split in SPLITS}
    for split, found in drawn.items():
        assert found == questions(split, 200, seed=3)
        assert found != questions(split, 200, seed=4)
        assert {split_of(q.question) for q in found} == {split}
    texts = [q.question for found in drawn.values() for q in found]
    assert len(set(texts)) == len(texts)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of train"):
        questions("validation", 1)


def test_question_text_round_trips() -> None:
    for question in questions("test", 50):
        assert 8 <= len(question.operations) <= 16
        assert parse_question(question.question) == question
        assert question.as_dict() == {"question": question.question, "answer": question.answer}


@pytest.mark.parametrize("text", ["", "12", "13;A+1", "3;B+1", "3;A*9", "3;A+1;A+2", "x;A+1"])
def test_bad_question_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_question(text)


def test_answer_by_hand() -> None:
    question = parse_question("12;A+9;B*6;C-4")
    assert question.answer == str(((12 + 9) % 13 * 6 - 4) % 13) == "5"


def test_careful_writer_is_always_right() -> None:
    rng = random.Random(0)
    for question in questions("train", 100):
        trace = write_trace(question, rng, CAREFUL)
        assert all(trace.clean)
        assert is_correct(question, trace.text)


def test_trace_is_right_when_no_slip_is_outstanding() -> None:
    rng = random.Random(1)
    ended_clean = 0
    for question in questions("train", 300):
        trace = write_trace(question, rng, Habits())
        assert final_answer(trace.text) == trace.answer
        assert trace.text.count(BOUNDARY) == len(trace.steps) == len(trace.clean)
        assert len(trace.heeded) == len(trace.steps)
        if trace.clean[-1]:
            ended_clean += 1
            assert is_correct(question, trace.text)
    assert 60 < ended_clean < 240


def test_writer_looks_back_more_often_while_a_slip_is_outstanding() -> None:
    rng = random.Random(2)
    counts: Counter[tuple[bool, bool]] = Counter()
    for question in questions("train", 300):
        trace = write_trace(question, rng, Habits(heed_span=100))
        for clean, step in zip(trace.clean, trace.steps[1:], strict=False):
            counts[clean, step.startswith(LOOK_BACK)] += 1
    checked = {c: counts[c, True] / (counts[c, True] + counts[c, False]) for c in (True, False)}
    assert checked[False] > 3 * checked[True]


def test_redo_continues_from_the_line_found_wrong() -> None:
    rng = random.Random(5)
    habits = replace(Habits(), look_back=(0.1, 0.5), notices_slip=0.9)
    redone = 0
    for question in questions("train", 50):
        steps = write_trace(question, rng, habits).steps
        for step, following in pairwise(steps):
            if step.endswith("?no"):
                redone += 1
                restated = step.split(",")[1].removesuffix("?no")
                assert following.rsplit("=", 2)[0] == restated.rsplit("=", 2)[0]
    assert redone > 20


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("</think>\\boxed{28}", "28"),
        ("\\boxed{1}\\boxed{07}<|end|>", "7"),
        ("28", None),
        ("\\boxed{2", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_answers_are_graded_by_math_verify() -> None:
    math_verify = pytest.importorskip("math_verify")
    question = questions("test", 1)[0]
    text = write_trace(question, random.Random(0), CAREFUL).text
    gold = math_verify.parse(f"\\boxed{{{question.answer}}}")
    wrong = math_verify.parse(f"\\boxed{{{int(question.answer) + 1}}}")
    assert math_verify.verify(gold, math_verify.parse(text))
    assert not math_verify.verify(wrong, math_verify.parse(text))


def test_tokenizer_round_trips_traces(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(7)
    for question in islice(question_stream("train", 9, 1, 16), 50):
        trace = write_trace(question, rng, Habits())
        text = prompt_text(question.question) + trace.text + EOS
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert "<0x" not in "".join(tokenizer.convert_ids_to_tokens(ids))
        boundary = tokenizer.convert_tokens_to_ids(BOUNDARY)
        assert ids.count(boundary) == len(trace.steps)


@pytest.mark.parametrize("text", ["Hello, wörld 日本\n\n\n", "12345 \\boxed{ a\tb }", "\n \n"])
def test_tokenizer_round_trips_any_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_one_boundary_token_and_no_empty_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    assert [t for t in texts if BOUNDARY in t] == [BOUNDARY]
    assert {LOOK_BACK, CHECK_LAST, "no", "ok", "144"} <= set(texts)
    assert all(texts)
    assert isinstance(tokenizer.added_tokens_decoder[0], AddedToken)
    assert len(tokenizer) % 64 == 0


def test_chat_template_is_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "12;A+9"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == prompt_text("12;A+9") == "<|user|>12;A+9<|assistant|><think>"


def test_loss_covers_the_reply_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    text = prompt_text("12;A+9") + "A:12+9=21-13=8\n\n</think>\\boxed{8}" + EOS
    ids = tokenizer(text)["input_ids"]
    _, weights = collate(tokenizer, [(ids, [True]), (ids[:-2], [False])])
    prompt_length = len(tokenizer(prompt_text("12;A+9"))["input_ids"])
    assert weights[0, :prompt_length].sum() == 0
    assert (weights[0, prompt_length:] > 0).all()
    assert (weights[1, len(ids) - 2 :] == 0).all()
    after_boundary = ids.index(tokenizer.convert_tokens_to_ids(BOUNDARY)) + 1
    assert weights[0, after_boundary] == weights.max() > 1
    assert 0 < weights[1, after_boundary] < 1


def test_network_equals_transformers(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Reasoner(Shape(num_hidden_layers=2, intermediate_size=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save(model, tokenizer, tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(len(tokenizer), (2, 40))
    with torch.no_grad():
        hidden = model(ids)
        out = other(ids, output_hidden_states=True)
    torch.testing.assert_close(hidden, out.hidden_states[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.logits(hidden), out.logits, rtol=1e-4, atol=1e-4)


def test_one_step_learns(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = Reasoner(Shape(num_hidden_layers=1, intermediate_size=32))
    ids, weights = collate(tokenizer, [(tokenizer(prompt_text("1;A+1") + "A:1")["input_ids"], [])])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss, _ = weighted_loss(model, ids, weights)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("shape", [(2, 24, 40), (2, 40, 24)])
def test_orthogonalize(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    update = orthogonalize(torch.randn(shape))
    assert update.shape == torch.Size(shape)
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.5 and values.max() < 1.5


def test_shipped_model_reasons() -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 5e6
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    right = 0
    asked: list[Question] = list(islice(question_stream("test", 1, 4, 6), 4))
    for question in asked:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question.question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**prompt, do_sample=False, max_new_tokens=400)
        text = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
        steps = text.split("</think>")[0].split(BOUNDARY)
        assert text.endswith(EOS) and steps.pop() == ""
        assert len(steps) >= len(question.operations)
        assert all(":" in step and "=" in step for step in steps)
        assert final_answer(text) is not None
        right += is_correct(question, text)
    assert right >= 1


def test_shipped_model_is_what_train_writes() -> None:
    files = {path.name for path in model_path().iterdir()}
    assert files >= {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (model_path() / "model.safetensors").stat().st_size <= 16 * 2**20
    shipped = AutoTokenizer.from_pretrained(model_path())
    assert shipped.get_vocab() == build_tokenizer().get_vocab()
    config = json.loads((model_path() / "config.json").read_text())
    assert config["vocab_size"] == len(shipped)


@pytest.mark.parametrize("habits", [Habits(), DWELLING])
def test_progress_reads_from_the_text_what_the_writer_knew(habits: Habits) -> None:
    rng = random.Random(5)
    wrong = 0
    for question in questions("train", 60, seed=2):
        trace = write_trace(question, rng, habits)
        found = progress(question.question, trace.text)
        assert found[: len(trace.clean)] == trace.clean
        assert not found[-1] or trace.answer == question.answer  # two slips may cancel out
        wrong += not found[-1]
    assert 10 < wrong < 50


def test_a_step_that_is_no_line_and_a_skipped_line_are_not_progress() -> None:
    question = "4;A+1;B+2;C+3"
    text = "A:4+1=5-0=5\n\nwell,\n\nC:5+3=8-0=8\n\n</think>\\boxed{8}"
    assert progress(question, text)[:3] == [True, True, False]


def test_wrong_traces_of_the_writer_that_dwells_are_longer() -> None:
    def lead(habits: Habits) -> float:
        rng, right, wrong = random.Random(1), [], []
        for question in questions("train", 150, seed=4):
            trace = write_trace(question, rng, habits)
            (right if trace.answer == question.answer else wrong).append(
                len(trace.steps) / len(question.operations)
            )
        return sum(wrong) / len(wrong) - sum(right) / len(right)

    assert lead(replace(DWELLING, heed_span=40)) > 0.2 > lead(replace(Habits(), heed_span=40))


def test_both_embedded_reasoners_are_complete_and_known_by_name_and_path() -> None:
    for name in (NAME, NAME_DWELLING):
        folder = model_path(name)
        assert reasoner_name(name) == reasoner_name(str(folder)) == name
        assert default_suffix(str(folder)) == ""
        scorer = load_scorer(scorer_path(name))
        model = load(folder)
        assert scorer.hidden_size == model.shape.hidden_size == 128
        assert AutoTokenizer.from_pretrained(folder).chat_template
    assert scorer.info.model == NAME_DWELLING
    assert reasoner_name("Qwen/Qwen3-8B") is None
    assert model_path(NAME).joinpath("config.json").read_text() == (
        model_path(NAME_DWELLING).joinpath("config.json").read_text()
    )
