"""Fuzzes the scorer reader: `python -m tests.fuzz.fuzz_scorer --seconds 600`."""

from tests.fuzz.fuzz import main

if __name__ == "__main__":
    main("scorer")
