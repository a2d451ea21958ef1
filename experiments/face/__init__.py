"""The framework from Python: what `from fedsim import fine_tune, compare, sweep` brings."""
