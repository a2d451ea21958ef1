"""What a GPU makes of the clipped sum: `python -m benchmarks.gpu`."""
