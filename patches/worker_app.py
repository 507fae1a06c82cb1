"""The application of a tokenizer worker: SGLang's own, in a process that is hooked first.

Importing this hooks the process; see `workers`.
"""

from __future__ import annotations

import os

from uvicorn.importer import import_from_string

from step_sglang import protocol
from step_sglang.patches import hooks
from step_sglang.patches.flags import hook_tokenizer_manager

app = import_from_string(os.environ[protocol.APP_ENV])
hook_tokenizer_manager(http=True)
hooks.install(hooks.WORKER)
