"""Compares methods that answer with many traces: runs them, tabulates, plots, replays.

`methods` defines how each method samples and votes, `run` runs the trials, `results` stores them,
`report` makes the tables, `replay` evaluates policies on recorded traces. Everything goes through
HTTP; nothing here knows SGLang's insides.
"""
