"""What a worker that is a group of devices cannot do, refused in a sentence."""

from fedsim.errors import InvalidInput

ALONE = "with --engine.devices-per-worker above 1"


def require_possible_group(devices: int, kind: str, workers: int | None, compile: str, gpus_per_worker: float) -> None:
    """Refuse an engine whose workers cannot be groups.

    Args:
        devices: Of one worker, at least 2.
        kind, workers, compile, gpus_per_worker: As of EngineConfig.

    Raises:
        InvalidInput: Names the option that does not go with it.
    """
    if kind == "local":
        raise InvalidInput("engine.kind", kind, f"ray {ALONE}", "A group is processes beside the run's own.")
    if workers == 0:
        raise InvalidInput("engine.workers", 0, f"at least 1 {ALONE}", "Slices of a device are not tried for groups.")
    if compile == "on":
        raise InvalidInput("engine.compile", compile, f"auto or off {ALONE}", "Passes of sharded models are not.")
    if gpus_per_worker not in (0.0, float(devices)):
        hint = "Each device of a worker is a GPU of its own."
        raise InvalidInput("engine.gpus-per-worker", gpus_per_worker, f"0 or {devices} {ALONE}", hint)


def require_shardable(local_steps: int, quantise: str) -> None:
    """Refuse what a model that is sharded over a worker's devices cannot do.

    Raises:
        InvalidInput: Users take local steps, or the base is quantised.
    """
    if local_steps > 1:
        hint = "After a local step each user would have a whole model of its own."
        raise InvalidInput("plan.local-steps", local_steps, f"1 {ALONE}", hint)
    if quantise != "none":
        raise InvalidInput("model.quantise", quantise, f"none {ALONE}", "Quantised weights cannot be sharded.")
