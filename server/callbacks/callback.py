"""What a callback is, and what it is told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fedsim.config import RunConfig, to_flat
from fedsim.plan import Plan

SECRET = ("sampling-seed", "noise-seed")
"""Options that are told to nobody: whoever knows them can undo what they decide."""


@dataclass(frozen=True, kw_only=True)
class BegunRun:
    """A run that is about to train, in plain values.

    Attributes:
        folder: The run's folder.
        config: Every option that is set by its name on the command line without dashes ("plan.epsilon"), as in
            config.json, but for the seeds of sampling and noise: whoever knows them can undo what they decide.
        plan: What is carried out, as `Plan.to_values` tells it: sampling, clip norm, noise multiplier, rounds, δ.
        training_metrics: Whether records hold what no noise protects, under "not_private".
        resumed_at: Rounds that are done, where a run goes on; None for a new run.
    """

    folder: str
    config: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    training_metrics: bool = True
    resumed_at: int | None = None

    @classmethod
    def of(cls, config: RunConfig, plan: Plan, folder: Path, resumed_at: int | None) -> Self:
        """The run of a configuration."""
        options = {name: value for name, value in to_flat(config).items() if name not in SECRET}
        return cls(
            folder=str(folder),
            config=options,
            plan=plan.to_values(),
            training_metrics=config.writes_training_metrics,
            resumed_at=resumed_at,
        )


class Callback:
    """Told of a run while it goes on. Override what you want to hear of.

    All of it happens in the server's thread, between rounds: what takes long makes the run long. An exception ends no
    run: it is said as a warning, and the callback is not called again in that run. InvalidInput from on_begin alone
    ends it, before anything is charged.

    One object may be given to several runs, which it is then told of one after the other.
    """

    def on_begin(self, run: BegunRun) -> None:
        """The run is about to train; of a run that goes on, its rounds after run.resumed_at are told again."""

    def on_record(self, record: dict[str, Any]) -> None:
        """A round is done, and so is whatever was measured after it.

        Args:
            record: What metrics.jsonl holds of it, a copy: "round" (0 is the model before training), "epsilon" (None
                where there is no guarantee), "gradient_evaluations", "learning_rate", "clip_norm", "not_private"
                (empty where metrics of training users are kept out); of a round with noise "released_norm", and where
                that is Gaussian "noise_norm"; and where the model was measured, "loss", "perplexity", "accuracy",
                "weights".
        """

    def on_end(self, summary: dict[str, Any]) -> None:
        """The run is finished, and its folder complete.

        Args:
            summary: What summary.json holds, a copy.
        """

    def on_stop(self, reason: str) -> None:
        """The run ended before it was finished: by a signal, a failure or an exception. It can often be resumed.

        Args:
            reason: In a sentence.
        """
