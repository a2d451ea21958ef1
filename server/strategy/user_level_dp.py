"""The strategy for apps of stock Flower: their training, their model, user-level differential privacy."""

import logging
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from fedsim.clip import Clip
from fedsim.config import OptimizerConfig
from fedsim.engine.node_messages import ArrayLayout, NodeRequest
from fedsim.engine.work import Vector
from fedsim.errors import Failure, InvalidInput
from fedsim.plan.nodes import NodePlan
from fedsim.privacy.bounds import shown_above
from fedsim.seeds import SEED_BITS, Seeds
from fedsim.validation import require_at_least, require_positive
from server.results.run_folder import new_output_folder
from server.strategy.asking import Asking, replies_to
from server.strategy.nodes import Nodes
from server.strategy.run import NodeRun, finished, require_free
from server.strategy.settings import Settings, Target

log = logging.getLogger("flwr")

SILENT_ROUNDS = 3
"""Rounds in a row in which nodes were asked and none counted, after which no more is spent."""
OF_FEDAVG = {
    "min_evaluate_nodes",
    "weighted_by_key",
    "evaluate_metrics_aggr_fn",
    "arrayrecord_key",
    "configrecord_key",
}
"""What FedAvg's constructor takes that has a meaning here."""
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class UserLevelDP(FedAvg):
    """Federated averaging with user-level differential privacy, for any Flower app and any model.

    In the server app, in the place of FedAvg::

        strategy = UserLevelDP(population_size=1000, sampling_probability=0.05, clip_norm=1.0, epsilon=4, delta=1e-5)
        result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=50)

    and in the client app `ClientApp(mods=[user_level_clip_mod])`. A node (SuperNode) is one user. Each round

    1. the strategy draws the cohort itself: every node joins independently with sampling_probability (Poisson
       sampling), by randomness of the operating system;
    2. the round is charged to the ledger, on disk, before anybody is asked;
    3. each node drawn trains with the app's own function, and the mod clips the difference to the arrays it was sent;
    4. the server checks every update, clips it again where it is too long, adds the updates up exactly (as integers on
       a public grid), adds Gaussian noise from a cryptographic generator, and divides by the constant
       sampling_probability × population_size: never by how many answered;
    5. the server's optimizer steps, with learning rate 1 as federated averaging does. An empty cohort is a round too.

    A node that fails, is late, or answers with something else counts as zero: only it has its user's data, so nobody
    can stand in for it, and a user who contributes zero is what a removed user looks like. That whether a node fails
    may depend on its data does no harm to the guarantee: its part of the sum is then zero or its clipped update, both
    within clip_norm of zero, and neither the other nodes' parts nor the divisor change. What would do harm is one
    node's data making *another* fail or late, as when nodes share a machine and the time is short; it is assumed not
    to, and the statement says so. A reply counts once, in the round that asked for it, or never.

    The number called ε is a certified upper bound for the arrays of every round together. Metrics that nodes compute
    (fraction_evaluate) are not covered.

    Before the first charge some nodes are asked for an update that nobody uses, so that an app that cannot train
    spends nothing.

    Args:
        population_size: Nodes that there can be in the federation, a public constant fixed before training. More nodes
            than that are refused.
        sampling_probability: Chance of each node to take part in a round.
        clip_norm: Bound on the L2 norm of one node's difference, all arrays together.
        delta: User-level δ, well below 1/population_size.
        epsilon: Target; the least noise that reaches it over all rounds is found. With noise_multiplier: a limit, at
            which training stops.
        noise_multiplier: Noise standard deviation over clip_norm, in place of a target; above 0.
        output: The run's folder: ledger.jsonl, privacy.json, metrics.jsonl, arrays.safetensors and what it takes to go
            on; by default one under runs/ named after the moment.
        resume: Go on with an interrupted run in output; where there is none a new one begins.
        release: Refuse what would make the statement untrue of arrays that are released (seeds, evaluation on nodes),
            and write nothing that is not private.
        optimizer: The server's rule, fed with the noised mean difference.
        server_learning_rate: Its learning rate; 1 with sgd is federated averaging. Adam needs a smaller one.
        server_momentum: Of the momentum rule.
        sampling_seed, noise_seed: For experiments: what they fix is not private.
        checkpoint_rounds: Rounds between checkpoints; 0 keeps none.
        rehearsal: Whether nodes are asked before the first charge.
        min_available_nodes: Nodes to wait for before training; by default all of population_size.
        fraction_evaluate, min_evaluate_nodes, weighted_by_key, evaluate_metrics_aggr_fn: As for FedAvg, of evaluation
            on nodes, which is not private: none by default.
        arrayrecord_key, configrecord_key: As for FedAvg.

    Raises:
        InvalidInput: A value outside the above.
    """

    def __init__(
        self,
        *,
        population_size: int,
        sampling_probability: float,
        clip_norm: float,
        delta: float,
        epsilon: float | None = None,
        noise_multiplier: float | None = None,
        output: str | Path | None = None,
        resume: bool = False,
        release: bool = False,
        optimizer: Literal["sgd", "momentum", "adam"] = "sgd",
        server_learning_rate: float = 1.0,
        server_momentum: float = 0.9,
        sampling_seed: int | None = None,
        noise_seed: int | None = None,
        checkpoint_rounds: int = 1,
        rehearsal: bool = True,
        min_available_nodes: int | None = None,
        fraction_evaluate: float = 0.0,
        **of_fedavg: Any,
    ) -> None:
        unknown = set(of_fedavg) - OF_FEDAVG
        if unknown:
            hint = "Who trains, and how replies are weighed, is what the guarantee rests on."
            raise InvalidInput("UserLevelDP", ", ".join(sorted(unknown)), "given only what it takes", hint)
        super().__init__(fraction_evaluate=fraction_evaluate or 1.0, min_available_nodes=0, **of_fedavg)
        self.fraction_evaluate = fraction_evaluate  # FedAvg would warn of 0, the default here
        self._target = Target(
            population_size=population_size,
            sampling_probability=sampling_probability,
            clip_norm=clip_norm,
            delta=delta,
            epsilon=epsilon,
            noise_multiplier=noise_multiplier,
        )
        require_at_least("checkpoint_rounds", checkpoint_rounds, 0)
        seeds = {"sampling": sampling_seed, "noise": noise_seed}
        given = tuple(name for name, seed in seeds.items() if seed is not None)
        if release and (given or fraction_evaluate):
            field = f"{given[0]}_seed" if given else "fraction_evaluate"
            raise InvalidInput(field, seeds[given[0]] if given else fraction_evaluate, "left out with release=True")
        self._optimizer = OptimizerConfig(name=optimizer, learning_rate=server_learning_rate, momentum=server_momentum)
        self._seeds, self._given = seeds, given
        self._output, self._resume, self._release = output, resume, release
        self._checkpoint_rounds, self._rehearsal = checkpoint_rounds, rehearsal
        self._least = population_size if min_available_nodes is None else min_available_nodes
        self._asked: tuple[NodeRequest, list[int], float] | None = None
        self.run: NodeRun | None = None

    def summary(self) -> None:
        """Log what was chosen."""
        plan = self._target.draft
        log.info("\t├──> User-level DP: add or remove one node, δ = %g", plan.delta)
        log.info("\t│\t├── Sampling: %s", plan.sampling_in_words)
        log.info("\t│\t├── Divisor: %g, which is constant", plan.normaliser)
        log.info("\t│\t└── Clip norm: %g", plan.clip_norm)
        log.info("\t└──> Evaluation on nodes (not private): fraction %g", self.fraction_evaluate)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Train, as Flower's strategies do, and leave a run folder.

        Args:
            grid: Where the nodes are.
            initial_arrays: The model. Arrays of floating-point numbers are trained, in float32; others never change.
            num_rounds: Rounds, over which a target ε is spent.
            timeout: Seconds for the nodes of a round to answer, and for nodes to come up.
            train_config, evaluate_config: What nodes are told, with "server-round" added.
            evaluate_fn: Called with the round and the arrays before the first round and after each.

        Returns:
            The last arrays; by round, as train_metrics_clientapp, "epsilon" spent; and what evaluations said.

        Raises:
            InvalidInput: Something does not fit; nothing is charged then.
            Failure: No node can train (nothing is charged then), or none of those that are asked answers any more.
        """
        require_positive("timeout", timeout)
        layout, plan = ArrayLayout.of(initial_arrays), self._target.plan(num_rounds)
        if not np.isfinite(first := layout.flatten(initial_arrays).astype(np.float32)).all():
            raise InvalidInput("initial_arrays", "not finite", "finite numbers")
        path = Path(self._output or new_output_folder("nodes")).absolute()
        going_on = require_free(path, self._resume)
        settings = self._settings(plan)
        if going_on and (arrays := finished(path, settings, initial_arrays, layout)) is not None:
            log.info("%s holds the finished run", path)
            return Result(arrays=arrays)
        self.summary()
        upper = shown_above(plan.epsilon().upper)
        log.info("Noise multiplier %.4g; ε will be at most %s", plan.noise_multiplier, upper)
        nodes, config = Nodes(grid, plan.num_users), ConfigRecord() if train_config is None else train_config
        nodes.wait(self._least, timeout)

        def messages(request: NodeRequest, parameters: Vector, drawn: list[int]) -> list[Message]:
            self._asked = request, drawn, timeout
            arrays = layout.filled(initial_arrays, parameters)
            made = list(self.configure_train(max(0, request.round) + 1, arrays, config, grid))
            self._asked = None
            return made

        asking = Asking(grid, nodes, layout.sizes, messages, timeout, told=not self._release)
        if self._rehearsal and not going_on:
            asking.rehearse(Clip(norm=plan.clip_norm), first, plan.population)
        begin = NodeRun.go_on if going_on else NodeRun.begin
        with begin(path, settings, layout, initial_arrays, nodes) as run:
            self.run = run
            result = self._rounds(run, asking, evaluate_config or ConfigRecord(), evaluate_fn)
            statement = run.finish()
        spent = shown_above(statement.epsilon.upper)
        log.info("ε = %s, δ = %g: %s says what that covers and what not", spent, plan.delta, run.folder.privacy)
        log.info("Confirm it by a second method: python -m experiments.run account --check %s", path)
        return result

    def _rounds(
        self, run: NodeRun, asking: Asking, evaluate_config: ConfigRecord, evaluate_fn: EvaluateFn | None
    ) -> Result:
        result, silent, planned = Result(arrays=run.arrays), 0, run.settings.plan.steps
        self._evaluate(run.done, result, evaluate_fn)
        while run.done < planned:
            if not run.round.affords(run.done):
                if not run.done:
                    raise Failure(
                        f"nothing is trained: no state is kept of what {len(run.ledger)} charges were spent on "
                        f"(ε = {run.epsilon:.3f}), and one more round would exceed ε = {self._target.limit:g}"
                    )
                log.info("Another round would exceed ε = %g: training ends after %d", self._target.limit, run.done)
                break
            asking.nodes.look()
            statistics = run.next_round(asking.gather)
            arrays, metrics = self.aggregate_train(run.done, ())
            result.arrays = result.arrays if arrays is None else arrays
            if metrics is not None:
                result.train_metrics_clientapp[run.done] = metrics
            log.info("[ROUND %d/%d] ε spent: %s", run.done, planned, shown_above(run.epsilon))
            self._evaluate_on_nodes(asking, result, evaluate_config)
            self._evaluate(run.done, result, evaluate_fn)
            silent = silent + 1 if statistics["units"] and not statistics.get("counted") else 0
            if silent == SILENT_ROUNDS and run.done < planned:
                reason = asking.reasons[0] if asking.reasons else "they are away"
                raise Failure(f"no node that was drawn in the last {silent} rounds has answered: {reason}")
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages to the nodes that the round has drawn; called by start, once the round is charged.

        A subclass may change config before it calls this one, by round.

        Raises:
            Failure: No round is under way.
        """
        if self._asked is None:
            raise Failure("UserLevelDP draws and charges rounds by itself: call start, not configure_train")
        request, nodes, timeout = self._asked
        config["server-round"] = server_round
        return [
            Message(
                RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: request.beside(config)}),
                dst_node_id=node,
                message_type=MessageType.TRAIN,
                ttl=timeout,
                group_id=str(server_round),
            )
            for node in nodes
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The arrays that a round released and the ε spent so far; called by start, which has summed and noised.

        A subclass may look at both, to save the arrays say. They are what the guarantee is about.

        Args:
            server_round: The round, from 1.
            replies: None are handed on: nothing but their noised sum leaves a round.

        Raises:
            Failure: No run is under way.
        """
        if self.run is None or list(replies):
            raise Failure("UserLevelDP sums what it asked for by itself: call start, not aggregate_train")
        return self.run.arrays, MetricRecord({"epsilon": self.run.epsilon})

    def _evaluate(self, number: int, result: Result, evaluate_fn: EvaluateFn | None) -> None:
        if evaluate_fn is not None and (metrics := evaluate_fn(number, result.arrays)) is not None:
            log.info("\t└──> %s", metrics)
            result.evaluate_metrics_serverapp[number] = metrics

    def _evaluate_on_nodes(self, asking: Asking, result: Result, config: ConfigRecord) -> None:
        assert self.run is not None
        messages = list(self.configure_evaluate(self.run.done, result.arrays, config, asking.grid))
        replies = [reply for _, reply in replies_to(asking.grid, messages, asking.timeout) if reply is not None]
        if replies and (metrics := self.aggregate_evaluate(self.run.done, replies)) is not None:
            log.info("\t└──> on nodes, not private: %s", metrics)
            result.evaluate_metrics_clientapp[self.run.done] = metrics

    def _settings(self, plan: NodePlan) -> Settings:
        sampling = self._seeds["sampling"]
        return Settings(
            plan=plan,
            limit=self._target.limit,
            optimizer=self._optimizer,
            seeds=Seeds(
                sampling=secrets.randbits(SEED_BITS) if sampling is None else sampling, noise=self._seeds["noise"]
            ),
            seeds_given=self._given,
            release=self._release,
            checkpoint_rounds=self._checkpoint_rounds,
        )
