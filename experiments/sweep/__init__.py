"""The fixed-compute comparison: points that vary, their runs, what came out, and the report."""
