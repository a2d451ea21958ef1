"""Mechanisms: what noise is added to a clipped sum, and what may be claimed for it."""
