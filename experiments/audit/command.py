"""`audit`: attack a plan, and the model of a finished run, and put lower bounds on ε beside the certified one."""

import dataclasses
import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fedsim.config import OptimizerConfig, PlanConfig, RunConfig
from fedsim.disk import require_writable_file
from fedsim.errors import Failure, InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.plan import Plan, UserSizes, plan_from_values
from fedsim.privacy.audit.result import AuditFinding, Promise
from fedsim.privacy.events import Adjacency
from fedsim.validation import require_at_least, require_between
from server.results.run_folder import RunFolder, write_json

FROM_USERS = (
    "not private: computed from training users without noise, and charged to no ledger. It is evidence for those who "
    "may see the users' data, and must not leave with the model."
)
ATTACK_WIDTH = 22
"""Letters of an attack's name that the table keeps on a line, where a terminal has 80."""
LEAST_TEXT = 32
"""Text canaries of whom anything can be said."""
NOT_CHARGED = "(not private: it trains on the private users once more, which no ledger charges)"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Attack a plan with canaries that are as bad as its clip permits, and a run's model with its own users.

    Canaries go through the round that training uses: sampling, contribution bounding, workers, dispatcher, release.
    What comes out is a lower bound on ε with a confidence: evidence, never a proof. Beside it the same round is
    compared with what its guarantee rests on. Ends with exit code 1 if an attack contradicts the guarantee, or a
    promise is broken.

    What canaries show is made of the plan alone. What the run's own users show is computed from training users without
    noise: it is marked as not private, kept in a file apart, and never written into a folder to be released.
    """

    run_folder: str | None = None
    """Folder of a finished run: its plan is audited and its privacy.json and report say so; its model is attacked."""
    plan: PlanConfig = field(default_factory=lambda: PlanConfig(epsilon=4.0))
    """The plan to audit, where there is no run."""
    num_users: int = 2000
    """Users that the plan is made for, where there is no run."""
    trials: int = 3000
    """Rounds with and rounds without the canary, each."""
    canaries: int = 500
    """Canaries of the one-run audit, at most as many as there are users."""
    parameters: int | None = None
    """Least size of the one-run audit's model, which its canaries divide among them; by default two each."""
    text_canaries: int = 0
    """Made-up users, each in training or not by its own coin, whom one training run's final model is to tell from each
    other: 2000, say. Without --run-folder they are the only users of the plan (everybody is in each round where
    --plan.gradients-per-round is their number times the group size), and this is the only attack. With it they join
    the folder's training users, in a run of its configuration, which reads these again and charges no ledger."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What text canaries are put into where there is no run; by default a model made for them, of a million trained
    parameters."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(name="sgd", learning_rate=0.1))
    """What trains it: small steps, so that losses tell what was released."""
    users: int = 500
    """Training and held-out users that the model of a run is attacked with, each at most."""
    repetitions: tuple[int, ...] = ()
    """Train again with canaries from the test users, each so many times in training, and attack that model: 0 1 8,
    say. Takes as long as so many runs of the folder's configuration, in this process. It reads the private training
    users again, which no ledger charges."""
    confidence: float = 0.95
    """Of each lower bound."""
    seed: int | None = None
    """Seed of coins, sampling and noise in the audit; by default from the operating system."""
    output: str | None = None
    """File for what canaries found, JSON; by default audit.json in the run's folder, or none."""
    not_private_output: str | None = None
    """File for what the run's own users showed, JSON, not private; by default audit_not_private.json in the run's
    folder, or, where that folder keeps metrics of training users out (--release), beside it under its name."""

    def __post_init__(self) -> None:
        require_at_least("trials", self.trials, 32)
        require_at_least("canaries", self.canaries, 16)
        require_at_least("text-canaries", self.text_canaries, LEAST_TEXT if self.text_canaries else 0)
        require_at_least("users", self.users, 32)
        if self.parameters is not None:
            require_at_least("parameters", self.parameters, 1)
        require_at_least("num-users", self.num_users, 2)
        require_between("confidence", self.confidence, 0, 1)

    def run(self) -> int:
        """Check, attack, print both, write the findings; returns 1 if the guarantee or a promise does not hold."""
        from experiments.audit.attacks import attacks

        for name in ("output", "not_private_output"):
            if (file := getattr(self, name)) is not None:
                require_writable_file(Path(file), name.replace("_", "-"))
        from experiments.audit.promises import promises

        seed = secrets.randbits(62) if self.seed is None else self.seed
        self._refuse_what_would_do_nothing()
        folder = None if self.run_folder is None else _finished(self.run_folder)
        if folder is None and self.text_canaries:
            return self._text_alone(seed)
        users = None if folder is None else self._users_file(folder)
        plan = self._pretend_plan() if folder is None else _plan_of(folder)
        if plan.adjacency is Adjacency.FIXED_GRAPH:
            hint = "Canaries are users who own their examples alone. account --check confirms such a run's ε."
            raise InvalidInput("run-folder", self.run_folder, f"of a run without {plan.adjacency.value}", hint)
        findings: list[AuditFinding] = []
        kept: list[Promise] = []
        if plan.noise_multiplier > 0:  # without noise nothing is claimed that an attack could contradict
            kept = promises(plan, seed)
            print_promises(kept)
            try:
                findings = attacks(
                    plan,
                    trials=self.trials,
                    canaries=self.canaries,
                    confidence=self.confidence,
                    seed=seed,
                    parameters=self.parameters,
                )
                print_findings(findings)
            except (Failure, InvalidInput) as failure:
                if all(promise.kept for promise in kept):
                    raise
                print(f"The attacks could not be run: {failure}")
        report: dict[str, Any] = {
            "kind": "evidence",
            "promises": [promise.to_json() for promise in kept],
            "white_box": [finding.to_json() for finding in findings],
        }
        output = self.output or (None if folder is None else str(folder.path / "audit.json"))
        if output is not None:
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            write_json(Path(output), report)
        if folder is not None and users is not None:
            _attach(folder, report)  # the rest takes longer and may fail: what canaries found is written by then
            findings += self._attack_model(folder, plan, users, seed)
            _write_report(folder)
        broken = any(finding.contradicts for finding in findings) or not all(promise.kept for promise in kept)
        return int(broken)

    def _refuse_what_would_do_nothing(self) -> None:
        """Refuse options that this audit would not look at."""
        unused: tuple[str, ...]
        model = ("model", "optimizer")
        if self.run_folder is not None:
            unused, where = ("plan", "num_users", *model), "left out with --run-folder, which has its own"
        elif self.text_canaries:
            unused = ("repetitions", "users", "num_users", "trials", "canaries", "parameters")
            where = "left out where --text-canaries are all that there is"
        else:
            unused, where = ("repetitions", "users"), "used with --run-folder"
            if any(getattr(self, name) != getattr(Audit(), name) for name in model):
                raise InvalidInput("model", "given", "used with --text-canaries")
        for name in unused:
            if (given := getattr(self, name)) != getattr(Audit(), name):
                shown = "given" if dataclasses.is_dataclass(given) else given
                raise InvalidInput(name.replace("_", "-"), shown, where)

    def _pretend_plan(self) -> Plan:
        sizes = UserSizes.of_quantiles(self.text_canaries or self.num_users, {0.5: self.plan.examples_per_user})
        return self.plan.for_users(sizes)

    def _text_alone(self, seed: int) -> int:
        """Text canaries as the plan's only users; returns 1 if they contradict its guarantee."""
        from experiments.audit.text_canaries import text_canaries
        from experiments.audit.text_model import model_for_text

        learner, vocabulary, row_tokens = model_for_text(self.model)
        found = text_canaries(
            RunConfig(plan=self.plan),
            self._pretend_plan(),
            learner,
            vocabulary,
            canaries=self.text_canaries,
            optimizer=self.optimizer,
            confidence=self.confidence,
            seed=seed,
            row_tokens=row_tokens,
        )
        print_findings([found.finding])
        print(found.in_words())
        if self.output is not None:
            Path(self.output).parent.mkdir(parents=True, exist_ok=True)
            write_json(Path(self.output), found.to_json())
        return int(found.finding.contradicts)

    def _attack_model(self, folder: RunFolder, plan: Plan, path: Path, seed: int) -> list[AuditFinding]:
        """Attack the run's model with its own users, and write what came out to a file apart."""
        from experiments.audit.black_box import black_box_canaries
        from experiments.audit.membership import infer_users
        from experiments.audit.text_model import text_canaries_among_users

        config = _config_of(folder)
        common: dict[str, Any] = {"confidence": self.confidence, "seed": seed}
        found: list[Any] = [infer_users(config, folder, users=self.users, delta=plan.delta, **common)]
        print(found[0].in_words())
        for repetitions in self.repetitions:
            print(f"Training again, with each canary {repetitions} times {NOT_CHARGED}", flush=True)
            found.append(black_box_canaries(config, plan, canaries=self.canaries, repetitions=repetitions, **common))
            print(found[-1].in_words())
        if self.text_canaries:
            print(f"Training again, with text canaries {NOT_CHARGED}", flush=True)
            found.append(text_canaries_among_users(config, plan, canaries=self.text_canaries, **common))
            print(found[-1].in_words())
        write_json(path, {"private": False, "in_words": FROM_USERS, "black_box": [one.to_json() for one in found]})
        print(f"{path}: {FROM_USERS}")
        return [found[-1].finding] if self.text_canaries and plan.noise_multiplier > 0 else []

    def _users_file(self, folder: RunFolder) -> Path:
        """Where findings about the run's own users go.

        Raises:
            InvalidInput: A file inside a folder that is to be released.
        """
        config = _config_of(folder)
        kept_out = config.release or not config.writes_training_metrics
        outer = _leaves_with(folder.path.resolve())
        if self.not_private_output is not None:
            path = Path(self.not_private_output)
            if kept_out and outer in path.resolve().parents:
                hint = "The run keeps what is computed from training users without noise out of its folder."
                raise InvalidInput("not-private-output", str(path), f"a file outside of {outer}", hint)
            return path
        inside = folder.audit_not_private
        if not kept_out:
            return inside
        return outer.with_name("_".join([outer.name, *folder.path.resolve().relative_to(outer).parts, inside.name]))


def _leaves_with(run: Path) -> Path:
    """The folder that leaves as a whole: the run's, or that of the comparison whose arm it is."""
    from experiments.report.run import COMPARISON

    return run.parent if (run.parent / COMPARISON).exists() else run


def print_promises(kept: list[Promise]) -> None:
    """What was checked, a line each, and what was found broken."""
    console = Console()
    for promise in kept:
        console.print(f"{'kept  ' if promise.kept else 'BROKEN'} {promise.what}", highlight=False)
        for fault in promise.broken:
            console.print(f"         {fault}", highlight=False)


def print_findings(findings: list[AuditFinding]) -> None:
    """The table on the terminal."""
    if not findings:
        return
    title = f"Audit: lower bounds on ε at δ = {findings[0].delta:g} from attacks (evidence, no proof)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("attack", min_width=ATTACK_WIDTH)
    for heading in ("this\nmechanism", "any\nmechanism", "certified", "trials"):
        table.add_column(heading, justify="right")
    table.add_column("verdict", no_wrap=True)
    for finding in findings:
        table.add_row(
            finding.attack,
            f"{finding.epsilon_lower:.2f}",
            f"{finding.epsilon_lower_free:.2f}",
            f"{finding.epsilon_certified:.2f}",
            f"{finding.trials:,}",
            "BROKEN" if finding.contradicts else "passed",
        )
    Console().print(table)


def _finished(path: str) -> RunFolder:
    if not (Path(path) / "summary.json").is_file():
        raise InvalidInput("run-folder", path, "the folder of a finished run", "It holds no summary.json.")
    return RunFolder(path)


def _plan_of(folder: RunFolder) -> Plan:
    try:
        described = json.loads(folder.config.read_text(encoding="utf-8"))["plan"]
        return plan_from_values(described)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput("run-folder", str(folder.path), "the folder of a finished run", f"{error}.") from None


def _config_of(folder: RunFolder) -> RunConfig:
    from server.identity import stored_config

    config: RunConfig = stored_config(
        RunConfig, json.loads(folder.config.read_text(encoding="utf-8")), str(folder.path)
    )
    return config


def _attach(folder: RunFolder, report: dict[str, Any]) -> None:
    """Put what canaries found into the run's privacy statement, in place of what an earlier audit put there."""
    statement = json.loads(folder.privacy.read_text(encoding="utf-8"))
    write_json(folder.privacy, statement | {"audit": report})


def _write_report(folder: RunFolder) -> None:
    from experiments.report.run import write_report

    print(f"report: {write_report(folder.path)}")
