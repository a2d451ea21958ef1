"""The fixed-compute comparison: points that vary, their runs, and what came out."""
