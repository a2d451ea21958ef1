"""Fine-tune language models with user-level differential privacy, in federated-style simulation.

    from fedsim import fine_tune

    rows = [{"user_id": "ann", "text": "Good morning."}, …]
    tuned = fine_tune("default", rows, epsilon=8, delta=1e-3, rounds=4, gradients_per_round=64)
    tuned.model, tuned.metrics, tuned.statement

Names are imported when they are first used: accounting needs no torch.
"""

import importlib
from typing import Any

_WHERE = {
    "experiments.face.fine_tune": ("fine_tune",),
    "experiments.face.compare": ("compare",),
    "experiments.face.sweep": ("sweep",),
    "experiments.face.outcomes": ("Compared", "FineTuned", "Swept"),
    "fedsim.config": ("RunConfig",),
    "fedsim.errors": ("Failure", "InvalidInput"),
    "fedsim.gradients": (
        "Batch",
        "CausalLanguageModel",
        "Objective",
        "RowLosses",
        "SequenceClassification",
        "SequenceToSequence",
        "clipped_sum",
    ),
    "fedsim.clip": ("Clip",),
    "fedsim.rows": ("TokenRows",),
    "fedsim.plan": ("ElsPlan", "Plan", "UlsPlan", "UserSizes"),
    "fedsim.privacy.accountant": ("Accountant", "delta_bounds", "epsilon_bounds"),
    "fedsim.privacy.calibration": (
        "calibrate_group_size",
        "calibrate_noise_multiplier",
        "calibrate_sampling_probability",
        "calibrate_steps",
    ),
    "fedsim.privacy.events": (
        "Adjacency",
        "BinomialMixtureGaussian",
        "Composed",
        "FixedSizeSubsampledGaussian",
        "Gaussian",
        "MixtureOfGaussians",
        "PoissonSubsampledGaussian",
        "RandomAllocatedGaussian",
        "Repeated",
        "TruncatedPoissonSubsampledGaussian",
    ),
    "fedsim.privacy.mechanisms.mechanism": ("MECHANISMS", "Mechanism"),
    "fedsim.sampling": ("SAMPLINGS", "Sampling"),
    "server.callbacks": ("BegunRun", "Callback"),
    "server.strategy": ("UserLevelDP",),
    "clients.mod": ("user_level_clip_mod",),
}
"""The names that there are, by the module that has them. This module alone imports what stands above it."""
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = ["__version__", *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fedsim")
    if name not in _MODULES:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
