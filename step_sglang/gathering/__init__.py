"""Groups of live traffic that are kept for training: which, what of them, and where.

Knows nothing of SGLang. `collect --from-traces` reads what is written here.
"""
