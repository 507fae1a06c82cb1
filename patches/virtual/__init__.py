"""A virtual GPU inside SGLang: a model that plays traces, and a clock instead of the machine's.

SGLang imports every module of this package as one of its models', where
``SGLANG_EXTERNAL_MODEL_PACKAGE`` names it. Scheduler, caches, loop and STEP's hooks are the real
ones; nothing is attended to, and no KV is written.
"""
