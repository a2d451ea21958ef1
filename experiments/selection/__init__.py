"""Choosing between settings at a price that is paid once: the best of a secret number of runs, by a private score."""
