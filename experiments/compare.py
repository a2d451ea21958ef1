"""`compare`: ULS and ELS side by side at the same compute and (ε, δ)."""

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from experiments.face.outcomes import Compared, FineTuned
from experiments.resume import how_to_go_on
from fedsim.config import Average, PlanConfig, RunConfig, to_flat
from fedsim.errors import InvalidInput
from fedsim.plan import ALGORITHMS, Algorithm
from fedsim.plan.bands import AUTO
from fedsim.privacy.mechanisms import MECHANISMS, QuantileClip
from fedsim.randomness import derived_seed
from fedsim.terminal import waiting
from fedsim.validation import require_at_least, require_positive
from server.precautions.stopping import Stopped
from server.results.run_folder import RunFolder, new_output_folder, write_json


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """What is tuned for one algorithm; unset fields are taken from the common settings."""

    group_size: int | None = None
    """Examples of one user, each round (uls) or in the whole run (els)."""
    clip_norm: float | None = None
    """L2 bound on one user's update (uls) or one example's gradient (els)."""
    learning_rate: float | None = None
    """The server's learning rate."""
    average: Average | None = None
    """Average of the released weights that is measured and exported; its option is common to both."""

    def own(self, name: str, common: Any) -> Any:
        """A field where it is set, else the common settings' value."""
        value = getattr(self, name)
        return common if value is None else value


@dataclass(frozen=True, kw_only=True)
class Compare(RunConfig):
    """Fine-tune by user-level sampling (ULS) and by the centralised example-level baseline (ELS).

    Both get the same gradient evaluations a round, rounds, ε, δ and model; group size, clip norm and learning rate
    are each algorithm's own, and where no mechanisms are named so are the bands of its noise (--plan.bands auto). So
    are the seeds of each arm: where one is given, they are derived from it and the arm's name, for arms that shared
    their randomness would not be independent.
    """

    CHOOSES = "an algorithm"

    algorithms: tuple[Algorithm, ...] = get_args(Algorithm)
    """The arms, in order."""
    uls: ArmConfig = field(default_factory=ArmConfig)
    """What is tuned for user-level sampling."""
    els: ArmConfig = field(default_factory=ArmConfig)
    """What is tuned for example-level sampling."""

    mechanisms: tuple[str, ...] = ()
    """Mechanisms to compare at the same ε, one arm for each with each algorithm; by default the plan's alone. Any that
    --plan.mechanism takes, and quantile-clip: the plain Gaussian with a clip norm that follows a quantile."""
    l1_clip_norm: float = 500.0
    """Clip norm of mechanisms that clip in L1, whose norms are larger."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.algorithms or len(set(self.algorithms)) < len(self.algorithms):
            raise InvalidInput("algorithms", self.algorithms, "uls, els or both, each once")
        require_positive("l1-clip-norm", self.l1_clip_norm)
        for algorithm in ALGORITHMS:
            tuned: ArmConfig = getattr(self, algorithm)
            require_at_least(f"{algorithm}.group-size", tuned.own("group_size", 1), 1)
            require_positive(f"{algorithm}.clip-norm", tuned.own("clip_norm", 1.0))
            require_positive(f"{algorithm}.learning-rate", tuned.own("learning_rate", 1.0))
        for mechanism in self.mechanisms:
            try:
                self._released_by(self.plan, mechanism)
            except InvalidInput as error:
                named = "mechanisms" if error.field == "plan.mechanism" else error.field
                raise InvalidInput(named, error.value, error.allowed, error.hint) from None

    def arm(self, algorithm: Algorithm, output: Path, mechanism: str | None = None) -> RunConfig:
        """The configuration of one arm, writing to its own folder inside output."""
        tuned: ArmConfig = getattr(self, algorithm)
        plan = dataclasses.replace(
            self.plan,
            algorithm=algorithm,
            group_size=tuned.own("group_size", self.plan.group_size),
            clip_norm=tuned.own("clip_norm", self.plan.clip_norm),
        )
        if mechanism is not None:
            plan = self._released_by(plan, mechanism)
        elif plan.bands is None and plan.noise_multiplier is None and not plan.buffers:
            plan = dataclasses.replace(plan, bands=AUTO)
        learning_rate = tuned.own("learning_rate", self.optimizer.learning_rate)
        averaging = self.optimizer.averaging(tuned.own("average", self.optimizer.average))
        optimizer = dataclasses.replace(averaging, learning_rate=learning_rate)
        common = {item.name: getattr(self, item.name) for item in dataclasses.fields(RunConfig)}
        name = algorithm if mechanism is None else f"{algorithm}-{mechanism.replace(':', '-')}"
        for kind in ("sampling", "noise"):
            if (given := common[f"{kind}_seed"]) is not None:
                common[f"{kind}_seed"] = derived_seed(given, kind, name)
        own = str(output / name)
        # An arm that has begun goes on, or is found to be finished; the others begin.
        resume = own if self.resume is not None and RunFolder(own).config.exists() else None
        return RunConfig(**{**common, "plan": plan, "optimizer": optimizer, "output": own, "resume": resume})

    def _released_by(self, plan: PlanConfig, mechanism: str) -> PlanConfig:
        """The plan with another mechanism, at a clip norm that suits the norm it clips in.

        Raises:
            InvalidInput: For a name that there is not.
        """
        if mechanism == QuantileClip.name:
            return dataclasses.replace(
                plan,
                mechanism="gaussian",
                mechanism_options=(),
                clip_quantile=plan.clip_quantile or QuantileClip.quantile,
            )
        # Bands that were asked for are those of mechanisms that ask for bands, where such are compared with others.
        asking = any(MECHANISMS.named(one).correlates for one in self.mechanisms if one != QuantileClip.name)
        bands = None if asking and not MECHANISMS.named(mechanism).correlates else plan.bands
        clip_norm = plan.clip_norm if MECHANISMS.named(mechanism).norm_order == 2 else self.l1_clip_norm
        options = plan.mechanism_options if mechanism == plan.mechanism else ()
        return dataclasses.replace(
            plan,
            mechanism=mechanism,
            mechanism_options=options,
            bands=bands,
            clip_norm=clip_norm,
            clip_quantile=0.0,
        )

    def run(self) -> int:
        """Run the arms, write comparison.json and the report, print the table."""
        from experiments.report.run import print_table

        folder = self.own_folder()
        try:
            compared = self.compared(folder)
        except KeyboardInterrupt:
            print(how_to_go_on(RunFolder(folder)), file=sys.stderr)
            raise
        except Stopped as stopped:
            print(f"{stopped} (of the comparison: --resume {folder})", file=sys.stderr)
            return stopped.exit_code
        report = compared.report()
        print_table(compared.summaries)
        for sentence in [*compared.prediction, *compared.cost]:
            print(sentence)
        print(f"report: {report}")
        return 0

    def compared(self, folder: Path) -> Compared:
        """Run the arms and write comparison.json.

        Args:
            folder: The comparison's; made once model and data are there.
        """
        from experiments.report.run import COMPARISON, PREDICTION, read_prediction, released_together
        from experiments.simulation import simulated_clients
        from server.app import train
        from server.callbacks import require_callbacks
        from server.identity import settings_of

        require_callbacks(self)
        arms = [
            self.arm(algorithm, folder, mechanism)
            for mechanism in self.mechanisms or (None,)
            for algorithm in self.algorithms
        ]
        run = RunFolder(folder)
        with run.undone_unless_kept(PREDICTION), simulated_clients(arms[0]) as grid:
            if self.resume is not None:
                run.hold.take("resume")
            else:
                run.make()
                run.write_config(config=to_flat(self), identity={"settings": settings_of(self)})
            if not (folder / PREDICTION).exists():
                self._predict(arms, folder)
            summaries = [train(grid, arm) for arm in arms]
        together = released_together(folder)
        cost = None if together is None else together.to_json()
        write_json(folder / COMPARISON, {"arms": summaries, "released_together": cost})
        return Compared(
            folder,
            {Path(str(arm.output)).name: FineTuned(Path(str(arm.output))) for arm in arms},
            prediction=read_prediction(folder),
            cost=[] if together is None else [together.in_words()],
        )

    def own_folder(self) -> Path:
        """The comparison's folder: one that may be made, or that of the same comparison to go on with."""
        from server.identity import require_same, settings_of

        run = RunFolder(self.resume or self.output or new_output_folder("compare"))
        if self.resume is None:
            run.require_unused()
        else:
            require_same(run.read_config()["identity"], {"settings": settings_of(self)})
        return run.path

    def _predict(self, arms: list[RunConfig], folder: Path) -> None:
        """Ask the planner before anything is trained, where both algorithms run with a finite ε."""
        from experiments.prediction import predict
        from experiments.report.run import PREDICTION
        from fedsim.resources import open_resources

        group_sizes: dict[str, int] = {arm.plan.algorithm: arm.plan.examples_per_user for arm in arms}
        if math.isfinite(self.plan.epsilon) and group_sizes.keys() == ALGORITHMS.keys():
            with waiting("Asking the planner who should do better"):
                train_split = open_resources(arms[0]).store.split("train")
                write_json(folder / PREDICTION, predict(arms[0], train_split, group_sizes).to_json())
