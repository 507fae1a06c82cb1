"""The `step-sglang` command: options in, a call of the package that does the work."""
