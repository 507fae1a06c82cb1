"""Runs SGLang's own test kits (``sglang.test.kits``) against servers with and without STEP."""
