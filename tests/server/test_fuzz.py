"""Generated request bodies: whatever `custom_params` holds, an answer or a 4xx, never a 500."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step_sglang import protocol
from tests.server.launch import Server

pytestmark = pytest.mark.server

EXAMPLES = 70 if settings.get_current_profile_name() == "full" else 20  # bodies to an endpoint
PROMPT = list(range(40, 60))

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["a" * 300, "a" * 200_000, "\x00", "\u202e../../etc", "${jndi}", "🧵"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
names = st.sampled_from([*protocol.REQUEST_MEMBERS, "Group", "", "pruned"]) | st.text(max_size=8)
steps = values | st.dictionaries(names, values, max_size=4)
custom_params = st.builds(lambda step: {protocol.REQUEST_KEY: step}, steps) | values
votes = st.fixed_dictionaries(
    # Few: every one of them is really sampled.
    {
        protocol.TRACES: st.sampled_from(
            [1, 2, 3, 0, -1, 5000, 2**70, 2.0, "2", None, True, [2], {}]
        )
    },
    optional={
        protocol.VOTE: st.sampled_from(
            ["calibrated", "majority", "best", "", 1, None, ["best"], {}]
        ),
        protocol.EARLY: st.sampled_from(["exact", "posterior", "off", "never", 0, None, {}]),
        protocol.THRESHOLD: st.sampled_from([0.01, 0.6, -1, 1e308, "0.1", None, [], True]),
        protocol.EXTRACT: st.sampled_from(["boxed", "choice", "number", "code", 2**70, None, {}]),
        protocol.STEP_SCORES: st.booleans(),
        protocol.GROUP: scalars,
    },
)
voted = st.builds(lambda step: {protocol.REQUEST_KEY: step}, votes)
counts = st.sampled_from([1, 1, 2, 3])  # stock SGLang itself answers a malformed n with a 500


@pytest.fixture(scope="module")
def server(roomy: Server) -> Server:
    return roomy


@pytest.fixture(scope="module")
def statuses() -> Counter[int]:
    return Counter()


def check(server: Server, statuses: Counter[int], path: str, body: Any) -> None:
    answer = requests.post(f"{server.url}{path}", json=body, timeout=120)
    statuses[answer.status_code] += 1
    # A stream has said 200 before anything can fail.
    assert '"code": 500' not in answer.text and '"code":500' not in answer.text, str(body)[:500]
    assert answer.status_code < 500, (answer.status_code, answer.text[:500], str(body)[:500])
    # Our errors do not echo the input at length. (FastAPI's own do: `custom_params` itself wrong.)
    assert "custom_params.step" not in answer.text or len(answer.content) < 5_000


# The same bodies in every run, so that a change elsewhere does not fail by chance.
relaxed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)


@relaxed
@given(params=custom_params, n=counts)
def test_generate(server: Server, statuses: Counter[int], params: Any, n: Any) -> None:
    sampling = {"max_new_tokens": 2, "n": n, "custom_params": params}
    check(server, statuses, "/generate", {"input_ids": PROMPT, "sampling_params": sampling})


@relaxed
@given(params=custom_params, n=counts)
def test_chat(server: Server, statuses: Counter[int], params: Any, n: Any) -> None:
    messages = [{"role": "user", "content": "1+1"}]
    body = {"model": "m", "messages": messages, "max_tokens": 2, "n": n, "custom_params": params}
    check(server, statuses, "/v1/chat/completions", {**body, "return_meta_info": True})


@relaxed
@given(params=voted | custom_params, stream=st.booleans())
def test_completions(server: Server, statuses: Counter[int], params: Any, stream: bool) -> None:
    body = {"model": "m", "prompt": "1+1", "max_tokens": 2, "stream": stream}
    check(server, statuses, "/v1/completions", {**body, "custom_params": params})


@relaxed
@given(params=voted, stream=st.booleans(), n=counts)
def test_votes(server: Server, statuses: Counter[int], params: Any, stream: bool, n: int) -> None:
    sampling = {"max_new_tokens": 2, "n": n, "custom_params": params}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "stream": stream}
    check(server, statuses, "/generate", body)


@relaxed
@given(body=values | st.dictionaries(st.sampled_from(["group", "rid"]), values))
def test_abort_group(server: Server, statuses: Counter[int], body: Any) -> None:
    check(server, statuses, protocol.ABORT_GROUP_PATH, body)


@pytest.mark.slow
@settings(relaxed, derandomize=False, max_examples=5 * EXAMPLES)
@given(params=voted | custom_params, stream=st.booleans(), n=counts)
def test_other_bodies(
    server: Server, statuses: Counter[int], params: Any, stream: bool, n: int
) -> None:
    sampling = {"max_new_tokens": 2, "n": n, "custom_params": params}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "stream": stream}
    check(server, statuses, "/generate", body)


def test_the_server_is_unharmed(server: Server, statuses: Counter[int]) -> None:
    if not statuses:
        pytest.skip("nothing was sent before it")
    assert statuses[200] >= 20 and statuses[400] + statuses[422] >= EXAMPLES // 2, statuses
    answers = server.generate(
        input_ids=PROMPT, sampling_params={"n": 8, "max_new_tokens": 50, "ignore_eos": True}
    )
    assert len(answers) == 8 and all("step" in answer["meta_info"] for answer in answers)
    print(f"{sum(statuses.values())} bodies: {dict(statuses)}")
    assert sum(statuses.values()) >= 5 * EXAMPLES
    state = server.info()["internal_states"][0]["step"]
    assert state["failures"] == {}
    assert state["groups"] == state["live_traces"] == 0
    log = server.log_text()
    assert "Exception in ASGI" not in log and "hit an exception" not in log
    assert "a" * 1000 not in log
