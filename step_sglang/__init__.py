"""STEP pruning (arXiv 2601.09093) for SGLang.

Nothing in this package imports SGLang; everything that knows the engine's insides is installed
beside it as ``step_sglang.patches``.
"""

__version__ = "0.1.0"
