"""What runs whose workers form the sums cannot do, refused in a sentence."""

from fedsim.errors import InvalidInput

AMONG_WORKERS = "with --engine.sums workers"


def require_keeping_workers(devices_per_worker: int, users_per_message: int) -> None:
    """Refuse workers that cannot keep their sums.

    Args:
        devices_per_worker, users_per_message: As of EngineConfig.

    Raises:
        InvalidInput: Names the option that does not go with it.
    """
    if devices_per_worker > 1:
        hint = "A group of devices keeps no sums."
        raise InvalidInput("engine.devices-per-worker", devices_per_worker, f"1 {AMONG_WORKERS}", hint)
    if users_per_message:
        hint = "A worker would keep a sum for each message."
        raise InvalidInput("engine.users-per-message", users_per_message, f"0 {AMONG_WORKERS}", hint)


def require_independent_noise(secure: bool, bands: int | str, buffers: int, clip_quantile: float) -> None:
    """Refuse a run whose releases cannot be made by workers, each of its own coordinates.

    Which mechanisms can be is asked of their noise (`fedsim.release.why_whole`).

    Args:
        secure, bands, buffers, clip_quantile: As of NoiseConfig and PlanConfig.

    Raises:
        InvalidInput: Names the option that does not go with it.
    """
    if secure:
        hint = "Keys of secure noise are drawn where the whole sum is."
        raise InvalidInput("noise.secure", True, f"off {AMONG_WORKERS}", hint)
    correlated = "Noise that is correlated over rounds is made of the whole of earlier noise."
    if buffers:
        raise InvalidInput("plan.buffers", buffers, f"0 {AMONG_WORKERS}", correlated)
    if bands != 1:
        raise InvalidInput("plan.bands", bands, f"1 {AMONG_WORKERS}", correlated)
    if clip_quantile:
        hint = "The count that a clip norm follows is noised by the server."
        raise InvalidInput("plan.clip-quantile", clip_quantile, f"0 {AMONG_WORKERS}", hint)
