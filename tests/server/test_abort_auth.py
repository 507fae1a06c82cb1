"""Who may abort a group: SGLang's own middleware and routing in front of STEP's endpoint."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.server.launch import environment

pytestmark = pytest.mark.server

# In a process of its own, because the server's application is one per process.
PROGRAM = """
import sys
from types import SimpleNamespace
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import http_server
from sglang.srt.utils.auth import add_api_key_middleware
from step_sglang.patches.endpoint import add_endpoint

add_endpoint()
add_endpoint()  # an engine may be launched more than once
paths = [getattr(route, "path", "") for route in http_server.app.routes]
assert paths.count("/step/abort_group") == 1
manager = SimpleNamespace(rid_to_state={})
http_server._global_state = SimpleNamespace(tokenizer_manager=manager)
admin = sys.argv[1] or None
add_api_key_middleware(http_server.app, api_key="key", admin_api_key=admin)
client = TestClient(http_server.app)
for path, body in (("/step/abort_group", {"group": "q"}), ("/abort_request", {"rid": ""})):
    for key in (None, "wrong", "key", "admin"):
        allowed = key == (admin or "key")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        status = client.post(path, json=body, headers=headers).status_code
        print(path, key, status)
        assert (status in (401, 403)) != allowed, (path, key, status)
"""


@pytest.mark.parametrize(
    "admin",
    ["admin", pytest.param("", marks=pytest.mark.full)],
    ids=["admin key", "API key alone"],
)
def test_aborting_a_group_needs_the_key_that_aborting_a_request_needs(admin: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, admin],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
