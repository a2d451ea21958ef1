"""`audit`: attack a plan, and the model of a finished run, and put lower bounds on ε beside the certified one."""

import dataclasses
import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.audit.one_run import one_run_scores
from experiments.audit.rounds import Audited, worst_canary_for
from fedsim.config import PlanConfig, RunConfig
from fedsim.errors import InvalidInput
from fedsim.plan import ElsPlan, Plan, UlsPlan, plan_from_json
from fedsim.privacy.audit.claim import Claim, epsilon_free
from fedsim.privacy.audit.one_run import guess, one_run_epsilon, one_run_gaussian_epsilon
from fedsim.privacy.audit.rates import attack_rates
from fedsim.privacy.audit.result import AuditFinding
from fedsim.validation import require_at_least, require_between
from server.identity import stored_config
from server.run_folder import RunFolder, write_json
from server.setup import make_plan


@dataclass(frozen=True, kw_only=True)
class PretendUsers:
    """A population of users without data, for a plan that is audited before it has any."""

    num_users: int
    rows_each: int

    @property
    def num_rows(self) -> int:
        return self.num_users * self.rows_each

    @property
    def user_offsets(self) -> np.ndarray:
        return np.arange(self.num_users + 1, dtype=np.int64) * self.rows_each


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Attack a plan with canaries that are as bad as its clip permits, and a run's model with its own users.

    Canaries go through the sampling, the clip, the noise and the division that training uses. What comes out is a
    lower bound on ε with a confidence: evidence, never a proof. Ends with exit code 1 if an attack contradicts the
    guarantee.
    """

    run_folder: str | None = None
    """Folder of a finished run: its plan is audited, its model attacked, and its privacy.json and report say so."""
    plan: PlanConfig = field(default_factory=lambda: PlanConfig(epsilon=4.0))
    """The plan to audit, where there is no run."""
    num_users: int = 2000
    """Users that the plan is made for, where there is no run."""
    trials: int = 3000
    """Rounds with and rounds without the canary, each."""
    canaries: int = 500
    """Canaries of the one-run audit."""
    users: int = 500
    """Training and held-out users that the model of a run is attacked with, each at most."""
    repetitions: tuple[int, ...] = ()
    """Train again with canaries from the test users, each so many times in training, and attack that model: 0 1 8,
    say. Takes as long as so many runs of the folder's configuration, in this process."""
    confidence: float = 0.95
    """Of each lower bound."""
    seed: int | None = None
    """Seed of coins, sampling and noise in the audit; by default from the operating system."""
    output: str | None = None
    """File for the findings, JSON; by default audit.json in the run's folder, or none."""

    def __post_init__(self) -> None:
        require_at_least("trials", self.trials, 32)
        require_at_least("canaries", self.canaries, 16)
        require_at_least("users", self.users, 32)
        require_at_least("num-users", self.num_users, 2)
        require_between("confidence", self.confidence, 0, 1)

    def run(self) -> int:
        """Attack, print a table, write the findings; returns 1 if an attack contradicts the guarantee."""
        seed = secrets.randbits(62) if self.seed is None else self.seed
        folder = None if self.run_folder is None else _finished(self.run_folder)
        plan = self._pretend_plan(seed) if folder is None else _plan_of(folder)
        findings = []
        if plan.noise_multiplier > 0:  # without noise nothing is claimed that an attack could contradict
            findings = white_box_findings(
                plan, trials=self.trials, canaries=self.canaries, confidence=self.confidence, seed=seed
            )
            print_findings(findings)
        report: dict[str, Any] = {"kind": "evidence", "white_box": [finding.to_json() for finding in findings]}
        if folder is not None:
            report["black_box"] = self._black_box(folder, plan, seed)
        elif self.repetitions:
            raise InvalidInput("repetitions", self.repetitions, "used with --run-folder")
        output = self.output or (None if folder is None else folder.path / "audit.json")
        if output is not None:
            write_json(Path(output), report)
        if folder is not None:
            _attach(folder, report)
        return int(any(finding.contradicts for finding in findings))

    def _pretend_plan(self, seed: int) -> Plan:
        return make_plan(
            self.plan, PretendUsers(num_users=self.num_users, rows_each=self.plan.examples_per_user), seed
        )

    def _black_box(self, folder: RunFolder, plan: Plan, seed: int) -> list[dict[str, Any]]:
        from experiments.audit.black_box import black_box_canaries
        from experiments.audit.membership import infer_users

        config = stored_config(RunConfig, json.loads(folder.config.read_text(encoding="utf-8")), str(folder.path))
        common: dict[str, Any] = {"confidence": self.confidence, "seed": seed}
        found: list[Any] = [infer_users(config, folder, users=self.users, delta=plan.delta, **common)]
        print(found[0].in_words())
        for repetitions in self.repetitions:
            found.append(black_box_canaries(config, plan, canaries=self.canaries, repetitions=repetitions, **common))
            print(found[-1].in_words())
        return [one.to_json() for one in found]


def white_box_findings(plan: Plan, *, trials: int, canaries: int, confidence: float, seed: int) -> list[AuditFinding]:
    """The canary attacks on a plan.

    Args:
        plan: The plan.
        trials: Rounds of each kind in the many-run audits.
        canaries: Canaries of the one-run audit, at most as many as the population holds.
        confidence: Of each lower bound.
        seed: Seed of coins, sampling and noise.
    """
    everybody = dataclasses.replace(plan, sampling_probability=1.0, **_small(plan))
    return [
        _many_runs("one release, canary always sampled", everybody, trials, confidence, seed),
        _many_runs("one round, sampled as planned", plan, trials, confidence, seed),
        _one_run(plan, canaries, confidence, seed),
    ]


def _small(plan: Plan) -> dict[str, Any]:
    """The canary and one other unit: where everybody is sampled, more would take time and change nothing."""
    return {"num_users": 2} if plan.name == "uls" else {"num_examples": plan.group_size + 1}


def _many_runs(name: str, plan: Plan, trials: int, confidence: float, seed: int) -> AuditFinding:
    audited = Audited(plan=plan, canary=worst_canary_for(plan), sampling_seed=seed, noise_seed=seed + 1)
    rates = attack_rates(*audited.scores(trials), confidence=confidence)
    claim = Claim(
        make_event=lambda noise: dataclasses.replace(plan, noise_multiplier=noise).step_event(),
        noise_multiplier=plan.noise_multiplier,
        delta=plan.delta,
        adjacency=plan.adjacency,
    )
    return AuditFinding(
        attack=name,
        epsilon_lower=claim.epsilon_from(rates),
        epsilon_lower_free=epsilon_free(rates, plan.delta),
        epsilon_certified=claim.epsilon,
        delta=plan.delta,
        confidence=confidence,
        contradicts=claim.contradicted_by(rates),
        trials=2 * trials,
    )


def _one_run(plan: Plan, canaries: int, confidence: float, seed: int) -> AuditFinding:
    owned = plan.group_size if plan.name == "els" else 1
    canaries = min(canaries, plan.population // owned)
    coins = np.random.default_rng(seed).random(canaries) < 0.5
    scores = one_run_scores(plan, coins, sampling_seed=seed, noise_seed=seed + 1)
    guesses = guess(scores, coins, max(2, canaries // 4))
    certified = plan.epsilon().upper
    free = one_run_epsilon(guesses, plan.delta, confidence=confidence)
    gaussian = plan.norm_order == 2
    return AuditFinding(
        attack="one run, many canaries",
        epsilon_lower=one_run_gaussian_epsilon(guesses, plan.delta, confidence=confidence) if gaussian else free,
        epsilon_lower_free=free,
        epsilon_certified=certified,
        delta=plan.delta,
        confidence=confidence,
        contradicts=free > certified,
        trials=canaries,
    )


def print_findings(findings: list[AuditFinding]) -> None:
    """The table on the terminal."""
    table = Table(title="Audit: lower bounds on ε from attacks (evidence, no proof)", title_justify="left")
    for heading in ("attack", "ε ≥, this mechanism", "ε ≥, any mechanism", "certified ε ≤", "δ", "trials", "verdict"):
        table.add_column(heading, justify="left" if heading in ("attack", "verdict") else "right")
    for finding in findings:
        table.add_row(
            finding.attack,
            f"{finding.epsilon_lower:.2f}",
            f"{finding.epsilon_lower_free:.2f}",
            f"{finding.epsilon_certified:.2f}",
            f"{finding.delta:g}",
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
    except (OSError, ValueError, KeyError, TypeError):
        raise InvalidInput("run-folder", str(folder.path), "the folder of a finished run") from None
    kind = UlsPlan if described.get("algorithm") == "uls" else ElsPlan
    fields = {"algorithm"} | {item.name for item in dataclasses.fields(kind)}
    return plan_from_json(json.dumps({name: value for name, value in described.items() if name in fields}))


def _attach(folder: RunFolder, report: dict[str, Any]) -> None:
    """Put the findings into the run's privacy statement and report."""
    from experiments.report.run import write_report

    statement = json.loads(folder.privacy.read_text(encoding="utf-8"))
    write_json(folder.privacy, statement | {"audit": report})
    print(f"report: {write_report(folder.path)}")
