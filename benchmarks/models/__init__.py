"""What the house makes of tiny random models of the families that people fine-tune: `python -m benchmarks.models`."""
