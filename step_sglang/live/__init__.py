"""The live page: what a scheduler tells of its traces, and the page that shows it.

``events`` is the schema, ``feed`` the scheduler's end of it, ``hub`` the HTTP server's, ``known``
what both the hub and a recorder gather, ``html`` the page. Knows nothing of SGLang.
"""
