"""Who may abort a group, and who may look: SGLang's middleware and routing before STEP's paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.launch import run_to_end

pytestmark = pytest.mark.server

# In a process of its own, because the server's application is one per process.
PROGRAM = """
import sys
from types import SimpleNamespace
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import http_server
from sglang.srt.utils.auth import add_api_key_middleware
from step_sglang.config import StepConfig
from step_sglang.patches import page
from step_sglang.patches.endpoint import add_endpoints

CONFIG = StepConfig(scorer="s", page=sys.argv[2])
add_endpoints(CONFIG)
add_endpoints(CONFIG)  # an engine may be launched more than once
paths = [getattr(route, "path", "") for route in http_server.app.routes]
assert paths.count("/step/abort_group") == 1
manager = SimpleNamespace(rid_to_state={})
http_server._global_state = SimpleNamespace(tokenizer_manager=manager)
admin = sys.argv[1] or None
add_api_key_middleware(http_server.app, api_key="key", admin_api_key=admin)
page.add_api_key_middleware(None, http_server.app)  # as the hook does
client = TestClient(http_server.app)
for path, body in (("/step/abort_group", {"group": "q"}), ("/abort_request", {"rid": ""})):
    for key in (None, "wrong", "key", "admin"):
        allowed = key == (admin or "key")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        status = client.post(path, json=body, headers=headers).status_code
        print(path, key, status)
        assert (status in (401, 403)) != allowed, (path, key, status)

shown = 200 if sys.argv[2] == "on" else 404
assert client.get("/step").status_code == 401
# Without the page a password is no key here either.
login = 200 if shown == 200 else 401
for auth, status in ((None, 401), (("any", "wrong"), 401), (("any", "key"), login)):
    answer = client.get("/step", auth=auth)
    assert answer.status_code == status, (auth, answer.status_code)
    if status == 401 and shown == 200:
        assert answer.headers["www-authenticate"].startswith("Basic ")
assert client.get("/step", headers={"Authorization": "Basic ?"}).status_code == 401
answer = client.get("/step", headers={"Authorization": "Bearer key"})
assert answer.status_code == shown
if shown == 200:
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-frame-options"] == "DENY"
    # The browser adds the password itself, whoever's page asks.
    other = {"Sec-Fetch-Site": "cross-site"}
    assert client.get("/step/events", auth=("any", "key"), headers=other).status_code == 403
assert client.get("/step/events").status_code == 401
# Elsewhere a password is no key.
assert client.get("/model_info", auth=("any", "key")).status_code == 401
"""


@pytest.mark.parametrize(
    ("admin", "shown"),
    [("admin", "on"), pytest.param("", "off", marks=pytest.mark.full)],
    ids=["admin key", "API key alone, no page"],
)
def test_aborting_a_group_and_looking_need_the_keys_of_their_like(
    admin: str, shown: str, tmp_path: Path
) -> None:
    script = tmp_path / "keys.py"
    script.write_text(PROGRAM)
    status, said = run_to_end((str(script),), admin, shown, log=tmp_path / "log")
    assert status == 0, said[-3000:]
