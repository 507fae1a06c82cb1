"""Compares methods of answering by many traces on one engine: runs, figures, tables, plots, replay.

`methods` says how each method asks and votes, `run` lets them take turns, `results` keeps what came
back, `report` makes the tables. Nothing here knows SGLang's insides: everything goes through HTTP.
"""
