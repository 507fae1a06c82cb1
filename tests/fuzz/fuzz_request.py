"""Fuzzes the request reader: `python -m tests.fuzz.fuzz_request --seconds 600`."""

from tests.fuzz.fuzz import main

if __name__ == "__main__":
    main("request")
