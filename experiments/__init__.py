"""The command line, presets, comparisons and reports."""
