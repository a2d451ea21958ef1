"""Changes that break a guarantee, one at a time, each held against the tests that should notice it."""
