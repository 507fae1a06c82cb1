"""`python -m step_sglang` is the `step-sglang` command."""

from step_sglang.cli.main import main

if __name__ == "__main__":
    main()
