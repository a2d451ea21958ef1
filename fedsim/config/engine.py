"""Where and how the clients compute, as options."""

from dataclasses import dataclass
from typing import Literal

from fedsim.config.devices import require_possible_group
from fedsim.config.worker_sums import require_keeping_workers
from fedsim.errors import InvalidInput
from fedsim.validation import require_at_least, require_positive


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where the clients run."""

    kind: Literal["ray", "local"] = "ray"
    """ray runs clients on Ray actors; local runs them in this process (debugging)."""
    workers: int | None = None
    """Actors (ray) or virtual nodes (local). By default as many actors as the cluster's GPUs have room for, or two
    where it has none; 0 finds the number of actors, and max_tokens where that is 0, by a short measured trial."""
    cpus_per_worker: int = 1
    """CPU cores of one actor; also its number of threads."""
    gpus_per_worker: float = 0.0
    """Share of a GPU for one actor: 0.25 places four actors on each GPU. By default a whole one, or where more workers
    are asked for than the cluster has GPUs, an equal share."""
    devices_per_worker: int = 1
    """Devices of one worker, on one machine. More than one shard the model among them (FSDP2): for models that one
    GPU has no room for. Each has cpus_per_worker cores and a GPU of its own, where there are GPUs."""
    users_per_message: int = 0
    """Users a message stands for; 0 sends one message a worker, 1 is the literal one-client-one-message mode."""
    address: str | None = None
    """Running Ray cluster to join: host:port of its head, ray://host:port from a machine that is none of its nodes, or
    auto for the one that RAY_ADDRESS names or `ray start` began here. By default, or with local, Ray is started on
    this machine, whatever runs there."""
    timeout_seconds: float = 600.0
    """A worker that has not answered after so long is given up and its users are computed elsewhere."""
    start_seconds: float = 300.0
    """How long Ray may take to start or to be joined, and workers after it."""
    attempts: int = 3
    """How often a user's update is asked for, of another worker each time, before the round fails."""
    max_tokens: int = 0
    """Tokens of one micro-batch; 0 chooses by device and model, or with exact 1,024 for any."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 runs the model in mixed precision, norms and sums stay float32; auto does on a GPU alone."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether the model's forward and backward pass are compiled (torch.compile); auto does for models of 67 million
    parameters and more on a GPU, where the minute or two that it takes, once a worker, are likely to be won back."""
    exact: bool = False
    """Sum clipped updates as fixed-point integers: the same bits for any number of workers on devices of one kind, at
    the cost of one gradient a user at a time. Passes are not compiled, GPUs compute with deterministic kernels alone,
    and a micro-batch that does not fit ends the run rather than shrink."""
    sums: Literal["auto", "server", "nodes", "workers"] = "auto"
    """Where workers' sums are added: server brings all of them to this process, nodes adds those of each Ray node
    there and brings one, workers has Ray actors add, noise and step among themselves, each its own coordinates: for
    plain Gaussian noise from a seed and a fixed clip norm. auto takes nodes for 4 MB and more where several nodes have
    more workers than there are nodes."""

    def __post_init__(self) -> None:
        if self.workers is not None:
            require_at_least("engine.workers", self.workers, 0)
        require_at_least("engine.cpus-per-worker", self.cpus_per_worker, 1)
        require_at_least("engine.gpus-per-worker", self.gpus_per_worker, 0)
        require_at_least("engine.users-per-message", self.users_per_message, 0)
        require_at_least("engine.max-tokens", self.max_tokens, 0)
        require_at_least("engine.devices-per-worker", self.devices_per_worker, 1)
        require_positive("engine.timeout-seconds", self.timeout_seconds)
        require_positive("engine.start-seconds", self.start_seconds)
        require_at_least("engine.attempts", self.attempts, 1)
        if self.exact and self.compile == "on":
            hint = "What is compiled depends on what came before, and so do an update's last bits."
            raise InvalidInput("engine.compile", self.compile, "auto or off with --engine.exact", hint)
        if self.kind == "local" and self.sums not in ("auto", "server"):
            hint = "Only workers on Ray form sums where they are: take --engine.kind ray."
            raise InvalidInput("engine.sums", self.sums, "auto or server with --engine.kind local", hint)
        if self.sums == "workers":
            require_keeping_workers(self.devices_per_worker, self.users_per_message)
        if self.devices_per_worker > 1:
            require_possible_group(
                self.devices_per_worker, self.kind, self.workers, self.compile, self.gpus_per_worker
            )
