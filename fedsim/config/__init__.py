"""The typed configuration of a run, its checks, and its forms as text. Each part is checked before anything starts."""

from fedsim.config.engine import EngineConfig
from fedsim.config.evaluation import EvaluationConfig
from fedsim.config.flat import from_flat, from_nested, to_flat
from fedsim.config.plan import PlanConfig
from fedsim.config.run import (
    Average,
    CheckpointConfig,
    NoiseConfig,
    OptimizerConfig,
    RunConfig,
)

__all__ = [
    "Average",
    "CheckpointConfig",
    "EngineConfig",
    "EvaluationConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "PlanConfig",
    "RunConfig",
    "from_flat",
    "from_nested",
    "to_flat",
]
