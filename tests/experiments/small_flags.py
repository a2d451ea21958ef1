"""Flags of runs that take seconds: a slice of the docstrings and a very small model."""

SMALL = [
    "--data.packages", "numpy",
    "--data.sequence-length", "32",
    "--model.small.layers", "2",
    "--model.small.width", "64",
    "--model.small.heads", "2",
    "--model.small.vocabulary-size", "1024",
    "--model.small.steps", "60",
    "--plan.delta", "1e-3",
    "--plan.gradients-per-round", "64",
    "--evaluation.max-rows", "100",
    "--evaluation.test-rows", "200",
    "--sampling-seed", "1",
    "--noise-seed", "2",
]  # fmt: skip
LOCAL = ["--engine.kind", "local", "--engine.workers", "1"]
TINY = [
    "--data.packages", "numpy",
    "--data.sequence-length", "32",
    "--model.small.layers", "1",
    "--model.small.width", "32",
    "--model.small.heads", "2",
    "--model.small.vocabulary-size", "512",
    "--model.small.steps", "5",
    "--plan.delta", "1e-3",
    "--plan.rounds", "2",
    "--evaluation.max-rows", "20",
    "--evaluation.test-rows", "20",
]  # fmt: skip
"""Of runs of which there are several: smaller still."""
