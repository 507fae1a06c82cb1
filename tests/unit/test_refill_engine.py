"""Refill on SGLang's own requests: who may take a place, and where there is room for it."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.sampling.sampling_params import SamplingParams

from step_sglang import protocol
from step_sglang.config import StepConfig
from step_sglang.patches import admission, places, refill, tokenizer
from step_sglang.patches.state import set_state, set_trace, trace_of
from step_sglang.pruning.admission import TraceLengths
from step_sglang.pruning.groups import GroupRegistry, TraceStatus
from step_sglang.pruning.refill import RULES
from step_sglang.reasoner.tokenizer import build_tokenizer

PROMPT, STEP = 50, 10  # tokens
TOKENIZER = build_tokenizer()
MARGIN = RULES[protocol.REFILL_BEST].margin


class Engine:
    """A scheduler of stand-ins around a running batch of SGLang's requests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pool: int = 100_000) -> None:
        self.groups = GroupRegistry()
        self.answered: list[str] = []
        self.branches: list[tuple[Any, Any, int]] = []  # request, source, position
        self.state: Any = SimpleNamespace(
            groups=self.groups, places=None, lengths=TraceLengths(), kv_limit=None, max_batch=None,
            metrics=None, events=None, config=StepConfig("s"), refused=None,
        )  # fmt: skip
        self.batch: Any = SimpleNamespace(reqs=[], token_to_kv_pool_allocator=self)
        self.scheduler: Any = Scheduler()
        vars(self.scheduler).update(
            waiting_queue=[], chunked_req=None, forward_ct=0, page_size=1, tree_cache=self,
            grammar_manager=SimpleNamespace(has_waiting_grammars=lambda: False),
            get_num_allocatable_reqs=lambda running, running_batch: 64, max_queued_requests=None,
            attn_tp_group=SimpleNamespace(world_size=1), max_total_num_tokens=pool,
            output_streamer=SimpleNamespace(stream_output=self._answer),
            _reqs_finishing_inflight=lambda batch: [],
        )  # fmt: skip
        set_state(self.scheduler, self.state)
        monkeypatch.setattr(refill, "_start", lambda s, state, b, *start: self._branch(*start))

    page_size, disable = 1, False

    def available_size(self) -> int:
        held = sum(req.kv.kv_allocated_len for req in self.batch.reqs)
        return int(self.scheduler.max_total_num_tokens) - held

    def evictable_size(self) -> int:
        return 0

    def supports_mamba(self) -> bool:
        return False

    supports_swa = supports_mamba

    def _answer(self, reqs: list[Any], logprobs: bool) -> None:
        self.answered += [req.rid for req in reqs]

    def _branch(self, req: Any, source: Any, position: int) -> None:
        self.branches.append((req, source, position))

    def trace(
        self, rid: str, *, prompt: int = 0, steps: int = 6, score: float = 0.5, group: str = "g",
        prune_at: float = 1.0, **params: Any,
    ) -> Any:  # fmt: skip
        sampling = SamplingParams(**{"max_new_tokens": 70, **params})
        sampling.normalize(TOKENIZER)
        req = Req(rid, "", array("q", range(prompt, prompt + PROMPT)), sampling)
        req.output_ids = array("q", [7] * (STEP * steps + 5))
        kind = places.kind_of(req)
        trace = self.groups.join(group, rid=rid, refill="best", prune_at=prune_at, kind=kind)
        set_trace(req, trace)
        for number in range(steps):
            trace.add_step(score, trace.score_sum + score, STEP * (number + 1) - 1)
        req.kv.kv_allocated_len = req.kv.kv_committed_len = PROMPT + len(req.output_ids)
        req.kv.cache_protected_len = PROMPT
        self.batch.reqs.append(req)
        return req

    def prune(self, req: Any) -> bool:
        """Returns whether its place is kept."""
        trace = trace_of(req)
        assert trace is not None
        kept = places.may_be_taken(self.state, trace)
        self._leave(req, TraceStatus.PRUNED)
        if kept:
            places.keep_place(self.state, req, "pruned")
        return kept

    def finish(self, req: Any) -> None:
        self._leave(req, TraceStatus.FINISHED)
        req.finished_reason = FINISH_LENGTH(len(req.output_ids))
        places.keep_source(self.state, req, trace_of(req))

    def _leave(self, req: Any, fate: TraceStatus) -> None:
        self.groups.end(trace_of(req), fate)
        self.batch.reqs.remove(req)

    def passes(self, number: int) -> None:
        """Some passes, after which it is decided."""
        self.scheduler.forward_ct += number
        refill.refill(self.scheduler, self.state, self.batch)

    @property
    def free(self) -> int:
        return int(self.state.places.free())


class Scheduler:
    """Whose attributes are set by `Engine`."""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(monkeypatch)


def test_a_place_that_no_other_trace_can_take_is_not_kept(engine: Engine) -> None:
    first, *others = (engine.trace(f"t{n}", prompt=1000 * n) for n in range(4))
    assert not engine.prune(first)  # the others have other prompts
    engine.trace("like t1", prompt=1000)
    assert engine.prune(others[0])


def test_a_place_is_answered_when_the_last_trace_like_it_has_gone(engine: Engine) -> None:
    pruned, like, other = engine.trace("a"), engine.trace("b"), engine.trace("c", prompt=1000)
    assert engine.prune(pruned)
    engine.scheduler.waiting_queue = [other]  # nothing is decided
    engine.passes(8)
    assert engine.free == 1 and not engine.answered
    engine.prune(like)
    engine.passes(8)
    assert engine.answered == ["a"] and engine.free == 0
    assert pruned.finished_reason.message == "pruned"
    assert trace_of(other) in {trace_of(r) for r in engine.batch.reqs}  # and its group lives


def test_a_place_waits_for_a_finished_trace_only_as_long_as_that_may_be_branched_from(
    engine: Engine,
) -> None:
    pruned, like = (engine.trace(rid, steps=18, max_new_tokens=190) for rid in "ab")
    engine.trace("c", prompt=1000)
    assert engine.prune(pruned)
    engine.finish(like)
    engine.scheduler.max_total_num_tokens = 0  # no room
    engine.passes(8)
    assert engine.free == 1 and not engine.answered
    engine.passes(200)  # a branch of it would end too late now
    assert engine.answered == ["a"] and engine.free == 0 and not engine.branches


def test_a_finished_trace_is_branched_from(engine: Engine) -> None:
    pruned, like = (engine.trace(rid, steps=18, max_new_tokens=190) for rid in "ab")
    engine.trace("c", prompt=1000)
    engine.prune(pruned)
    engine.finish(like)
    engine.passes(8)
    assert [(req.rid, source.rid) for req, source, _ in engine.branches] == [("a", "b")]


@pytest.mark.parametrize(
    "params",
    [
        {"max_new_tokens": 60},
        {"min_new_tokens": 5},
        {"ignore_eos": True},
        {"stop": ["x"]},
        {"stop_regex": ["x+"]},
        {"stop_token_ids": [3]},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"top_k": 20},
        {"min_p": 0.1},
        {"frequency_penalty": 0.1},
        {"presence_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {"3": 1.0}},
    ],
    ids=lambda params: next(iter(params)),
)
def test_a_text_goes_to_none_that_was_asked_for_another(engine: Engine, params: Any) -> None:
    """Not a trace's text to a request with another limit, other stops or other sampling."""
    asked = engine.trace("a", **params)
    good = engine.trace("b", score=0.9)
    assert places.kind_of(asked) != places.kind_of(good)
    like = engine.trace("c", score=0.1, **params)
    assert engine.prune(asked)
    engine.passes(8)
    assert [source.rid for _, source, _ in engine.branches] == ["c"]
    assert not engine.prune(like) or engine.free == 1


def test_the_seed_and_how_text_is_shown_make_no_other_kind(engine: Engine) -> None:
    alike = [
        engine.trace("a", sampling_seed=1, stop_token_ids=[3, 4], stop=["x", "y"]),
        engine.trace("b", sampling_seed=2, stop_token_ids=[4, 3], stop=["y", "x"]),
        engine.trace("c", skip_special_tokens=False, stop_token_ids=[3, 4], stop=["x", "y"]),
    ]
    assert len({places.kind_of(req) for req in alike}) == 1


def test_a_branch_stays_below_its_groups_own_share(engine: Engine) -> None:
    """`prune_at` of the group: what it and the branch grow by in the margin fits below it."""
    held = 8 * 65
    for tokens, branches in ((held + 2 + 9 * MARGIN - 1, 0), (held + 2 + 9 * MARGIN, 1)):
        engine.branches.clear()
        name = f"g{tokens}"
        reqs = [
            engine.trace(f"{name}-{n}", group=name, prune_at=tokens / 100_000) for n in range(9)
        ]
        assert engine.prune(reqs[0])
        engine.passes(8)
        assert len(engine.branches) == branches
        engine.trace(f"{name}-free", group=f"{name}-2")  # another group's memory is none of it
        for req in list(engine.batch.reqs):
            engine.prune(req)
        engine.passes(1)


def test_branches_of_all_kinds_share_their_groups_share(engine: Engine) -> None:
    tokens = 6 * 65 + 2 + 7 * MARGIN  # for one
    reqs = [
        engine.trace(f"{n}", prompt=1000 * (n % 2), prune_at=tokens / 100_000) for n in range(8)
    ]
    assert engine.prune(reqs[0]) and engine.prune(reqs[1])
    engine.passes(8)
    assert len(engine.branches) == 1


def test_ranks_see_the_same_room_when_one_of_them_fails(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They must ask each other as often, or they wait for ever."""
    rooms: list[list[int]] = []
    can_start, choose, agreed = refill.can_start, refill.choose_branches, []

    def noted(*args: Any) -> int:
        rooms[-1] += [room.tokens for room in args[4]]
        return can_start(*args)

    def chosen(*args: Any) -> list[Any]:
        found = choose(*args)
        if len(rooms) == 2:
            raise RuntimeError("this rank alone")
        return found

    def agree(scheduler: Any, mine: list[Any]) -> list[Any]:
        if len(rooms) == 1:
            agreed.append(mine)
            return mine
        return list(agreed.pop(0))

    monkeypatch.setattr(refill, "can_start", noted)
    monkeypatch.setattr(refill, "choose_branches", chosen)
    monkeypatch.setattr(refill, "agree", agree)
    for rank in range(2):
        rooms.append([])
        name = f"rank{rank}"
        reqs = [engine.trace(f"{rank}-{n}", group=name, prompt=1000 * (n % 2)) for n in range(8)]
        assert engine.prune(reqs[0]) and engine.prune(reqs[1])
        engine.passes(8)
        assert len(engine.branches) == 2
        engine.branches.clear()
        for req in list(engine.batch.reqs):
            engine.prune(req)
        engine.state.places = None
    assert rooms[0] == rooms[1] and len(rooms[0]) == 2 and rooms[0][1] < rooms[0][0]


def test_nobody_is_looked_at_where_nothing_can_start(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    monkeypatch.setattr(refill, "_view", lambda *args: looked.append(args))
    reqs = [engine.trace(f"{n}") for n in range(4)]
    engine.prune(reqs[0])
    engine.scheduler.max_total_num_tokens = 3 * 115 + 2 + 4 * MARGIN - 1
    engine.passes(8)
    assert not looked and not engine.branches and engine.free == 1
    monkeypatch.undo()
    monkeypatch.setattr(refill, "_start", lambda s, state, b, *start: engine._branch(*start))
    engine.scheduler.max_total_num_tokens += 1
    engine.passes(8)
    assert len(engine.branches) == 1


def test_an_id_in_use_again_is_not_taken_for_the_finished_trace(engine: Engine) -> None:
    bad, good = engine.trace("same", score=0.1), engine.trace("other", score=0.2)
    pruned = engine.trace("pruned")
    engine.finish(bad)
    again = engine.trace("same", score=0.9)
    assert engine.prune(pruned)
    engine.passes(8)
    ((_, source, _),) = engine.branches
    assert source is again and source is not bad and good in engine.batch.reqs


def adder(engine: Engine, free: int) -> Any:
    """STEP's adder over SGLang's, in a pool with so many free tokens."""

    class Adder(PrefillAdder):
        """Without a tree: its own part of memory is what counts."""

        cur_rem_tokens = property(lambda self: free)
        rem_total_tokens = property(lambda self: free - self.memory_budget.total_offset)

        def __init__(self) -> None:
            self.running_batch, self.tree_cache = engine.batch, engine
            self.page_size, self.per_req_token_overhead = 1, 1
            self.can_run_list, self.rem_chunk_tokens, self.new_token_ratio = [], None, 1.0
            self.is_hybrid_swa = False
            self.memory_budget = SimpleNamespace(total_offset=0)
            self.memory_budget.total_offset = sum(
                self._get_running_request_total_token_offset(req) for req in engine.batch.reqs
            )

        def _lock_node(self, node: Any) -> Any:
            return memoryview(b"")  # any context

        def budget_state(self) -> Any:
            return AddReqResult.CONTINUE

        def add_one_req(self, req: Any, *args: Any) -> Any:
            params = req.sampling_params
            need = len(req.full_untruncated_fill_ids) - req.prefix_len + 1
            need += max(params.max_new_tokens - len(req.output_ids), 0)
            if need >= self.rem_total_tokens:
                return AddReqResult.NO_TOKEN
            self.can_run_list.append(req)
            return AddReqResult.CONTINUE

    return admission._step_adder(Adder, engine.scheduler)()


@pytest.mark.parametrize("form", ["trace", "branch", "branch that comes back"])
@pytest.mark.parametrize("free", [1000, 5])
def test_what_ordinary_requests_reserve_holds_no_branch_back(
    engine: Engine, form: str, free: int
) -> None:
    """A branch starts where it fits, as any trace does; only that no other gives for it."""
    parent, place, *_ = (engine.trace(f"t{n}", max_new_tokens=900) for n in range(4))
    for req in engine.batch.reqs:
        req.kv.kv_allocated_len += 900
    ordinary = Req("ordinary", "", array("q", range(PROMPT)), SamplingParams(max_new_tokens=3000))
    engine.batch.reqs.append(ordinary)
    given: list[int] = []
    if form == "trace":
        new = engine.trace("new", max_new_tokens=900)
        engine.batch.reqs.remove(new)
        new.output_ids = array("q")
    else:
        engine.prune(place)
        trace = engine.groups.branch(trace_of(place), trace_of(parent), 29, 0, 0)
        set_trace(new := place, trace)
        new.output_ids = array("q", [7] * (30 if form == "branch" else 45))
        new.finished_reason = None
    new.full_untruncated_fill_ids = array("q", range(PROMPT + 10))
    new.prefix_len = PROMPT
    step = adder(engine, free)
    room = step._room()
    room._round.prune_for = lambda share, tokens: given.append(tokens)
    result = step.add_one_req(new, False, None)
    assert (result is AddReqResult.CONTINUE) == (free == 1000)
    assert bool(given) == (free == 5 and form != "branch")


def test_strip_thinking_cache_is_a_reason_against_branches() -> None:
    config = StepConfig("s")
    server = SimpleNamespace(speculative_algorithm=None, strip_thinking_cache=True)
    asked: Any = SimpleNamespace(
        sampling_params=SamplingParams(), stream=False, return_logprob=False,
        return_hidden_states=False, session_id=None, session_params=None, mm_inputs=None,
        input_embeds=None, positional_embed_overrides=None, custom_logit_processor=None,
        return_sampling_mask=False, return_routed_experts=False, return_indexer_topk=False,
    )  # fmt: skip
    said = tokenizer._why_no_branches(asked, False, config, server)
    assert said is not None and "--strip-thinking-cache" in said
    server.strip_thinking_cache = False
    assert tokenizer._why_no_branches(asked, False, config, server) is None
