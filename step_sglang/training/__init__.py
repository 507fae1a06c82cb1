"""From questions to a trained scorer: collect traces from a server, train, measure.

`collect` fills a store, `train` reads stores and writes a scorer; `cli` calls both.
"""
