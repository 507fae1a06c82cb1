"""What a vote is told of traces whose text is withheld: counts, no token, and the text in the end.

Through SGLang's own stream of tokens and its detokenizer.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.managers.scheduler_components import output_streamer
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from step_sglang import protocol
from step_sglang.patches import places
from step_sglang.patches.progress import Progress, due
from step_sglang.patches.state import set_trace
from step_sglang.patches.streaming import _step_streamer
from step_sglang.pruning.groups import GroupRegistry, TraceStatus
from step_sglang.reasoner.tokenizer import build_tokenizer
from step_sglang.voting.one_choice import VoteProgress
from step_sglang.voting.session import STREAM_INTERVAL, VoteRules, VoteSession

TOKENIZER = build_tokenizer()
PROMPT = TOKENIZER.encode("12 and 30", add_special_tokens=False)
TEXT = TOKENIZER.encode("12 + 30 = 42, so it is 42. " * 4, add_special_tokens=False)


class Sent:
    """In the place of the socket to the detokenizer."""

    def __init__(self) -> None:
        self.chunks: list[Any] = []

    def send_output(self, payload: Any) -> None:
        self.chunks.append(payload)


class Server:
    """SGLang's output stream with STEP's hook, and the detokenizer behind it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups = GroupRegistry()
        state: Any = SimpleNamespace(
            groups=self.groups, metrics=None, places=None,
            lengths=SimpleNamespace(finished=lambda length: None),
        )  # fmt: skip
        serving = SimpleNamespace(stream_interval=1, weight_version="default")
        rank = SimpleNamespace(dp_rank=0, attn_tp_rank=0)
        monkeypatch.setattr(output_streamer, "get_serving", lambda: serving)
        monkeypatch.setattr(output_streamer, "get_parallel", lambda: rank)
        monkeypatch.setattr(
            output_streamer,
            "get_observability",
            lambda: SimpleNamespace(enable_request_time_stats_logging=False),
        )
        monkeypatch.setattr(output_streamer, "wrap_as_pickle", lambda value: value)
        self.sent: Any = Sent()
        self.stream = _step_streamer.__wrapped__(output_streamer.SchedulerOutputStreamer, state)(
            send_to_detokenizer=self.sent,
            tree_cache=None,
            server_args=None,
            is_generation=True,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            disaggregation_mode=DisaggregationMode.NULL,
            enable_hicache_storage=lambda: False,
        )
        self.detokenizer: Any = DetokenizerManager.__new__(DetokenizerManager)
        self.detokenizer.decode_status = {}
        self.detokenizer.vocab_size = len(TOKENIZER)
        self.detokenizer.disable_tokenizer_batch_decode = False
        self.detokenizer.tokenizer = TOKENIZER
        self.detokenizer.tool_close_token_ids = set()

    def request(self, rid: str, *, vote: bool = True, logprob: bool = False) -> Any:
        params = SamplingParams(max_new_tokens=900, stream_interval=None if vote else 1 << 30)
        req: Any = Req(rid, "", array("q", PROMPT), params, stream=True, return_logprob=logprob)
        set_trace(req, self.groups.join("g", rid=rid, refill=protocol.REFILL_BEST))
        return req

    def chunks(self, *reqs: Any, skip: Any = None) -> list[dict[str, Any]]:
        """What a decode step sends of these."""
        self.stream.stream_output(list(reqs), any(req.return_logprob for req in reqs), skip)
        found = []
        for sent in self.sent.chunks:
            texts = self.detokenizer._decode_batch_token_id_output(sent)
            for i, rid in enumerate(sent.rids):
                info = {
                    "id": rid,
                    "completion_tokens": sent.completion_tokens[i],
                    "finish_reason": sent.finished_reasons[i],
                    protocol.META_KEY: sent.customized_info[protocol.META_KEY][i],
                }
                index = int(rid[1:])
                ids = list(sent.output_ids[i])
                found.append(
                    {"index": index, "text": texts[i], "output_ids": ids, "meta_info": info}
                )
        self.sent.chunks.clear()
        return found


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


def test_a_vote_knows_traces_that_send_no_text(server: Server) -> None:
    reqs = [server.request(f"t{i}", logprob=i == 2) for i in range(3)]
    session = VoteSession(3, VoteRules())
    assert VoteProgress([session]).comment() is None and server.chunks(*reqs) == []
    told = []
    for count in range(1, len(TEXT)):
        for req in reqs:
            req.output_ids = array("q", TEXT[:count])
        chunks = server.chunks(*reqs, skip=reqs[1])
        for chunk in chunks:
            assert chunk["text"] == "" and chunk["output_ids"] == []
            assert chunk["meta_info"]["completion_tokens"] == count
            assert not session.feed(chunk)
        told += [count] * bool(chunks)
    assert told == list(range(1, len(TEXT), STREAM_INTERVAL)) and len(told) > 2
    assert VoteProgress([session]).comment() == ": step 3 running, 0 finished, 0 pruned\n\n"
    assert [trace.tokens for trace in session.traces] == [told[-1], 0, told[-1]]
    # The end sends all of it, once; to the detokenizer too.
    reqs[0].finished_reason = FINISH_LENGTH(length=count)
    (chunk,) = server.chunks(reqs[0])
    assert chunk["output_ids"] == TEXT[:count] and session.feed(chunk)
    assert session.traces[0].text == TOKENIZER.decode(TEXT[:count])
    assert session.traces[0].num_ids == count


def test_a_vote_ends_traces_that_send_no_text(server: Server) -> None:
    reqs = [server.request(f"t{i}") for i in range(32)]
    session = VoteSession(32, VoteRules(shrink=0.1, early="off"), max_new_tokens=900)
    for req in reqs:
        req.output_ids = array("q", TEXT[:5])
    for chunk in server.chunks(*reqs):
        session.feed(chunk)
    answer = TOKENIZER.encode("so it is \\boxed{42}", add_special_tokens=False)
    for req in reqs[:12]:
        req.output_ids = array("q", answer)
        req.finished_reason = FINISH_LENGTH(length=len(answer))
    for chunk in server.chunks(*reqs[:12]):
        session.feed(chunk)
    session.count()
    ended = session.surplus()
    assert ended and set(ended) < {req.rid for req in reqs[12:]}


def test_a_request_itself_stays_as_it_is(server: Server) -> None:
    req = server.request("t0")
    req.output_ids = array("q", TEXT)
    before = dict(vars(req))
    (told,) = due([req], None)
    assert told is req and due([req], None) == []
    quiet = Progress(req)
    quiet.init_incremental_detokenize()
    quiet.send_token_offset = 99
    assert vars(req) == before


def test_whoever_streams_its_end_alone_gets_that_alone(server: Server) -> None:
    req = server.request("t0", vote=False)
    req.output_ids = array("q", TEXT)
    assert server.chunks(req) == []


def test_no_branch_takes_the_place_of_a_trace_that_its_vote_ends() -> None:
    groups = GroupRegistry()
    traces = [groups.join("g", rid=f"t{i}", refill=protocol.REFILL_BEST) for i in range(4)]
    state: Any = SimpleNamespace(places=None)
    assert all(places.may_be_taken(state, trace) for trace in traces)
    groups.dismiss(traces[0], protocol.PRUNED_FOR_VOTE)
    assert not places.may_be_taken(state, traces[0]) and places.may_be_taken(state, traces[1])
    groups.end(traces[1], TraceStatus.PRUNED)
