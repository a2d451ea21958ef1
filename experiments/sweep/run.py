"""Run the points of a sweep: as Ray tasks with a CPU or GPU slice each, or one after the other in this process."""

import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.sweep.points import Point
from fedsim.config import RunConfig, to_flat
from fedsim.engine.devices import cores_here
from fedsim.engine.environment import Whereabouts
from fedsim.seeds import Seeds
from server.precautions.stopping import Stopped
from server.results.run_folder import RunFolder, write_json

NO_SEEDS: Mapping[str, Seeds] = {}


@dataclass(frozen=True)
class Finished:
    """How a point ended: error is None, or the traceback of its failure."""

    point: Point
    error: str | None


def is_finished(folder: Path, point: Point) -> bool:
    """Whether a point has its result already."""
    return (folder / point.name / "summary.json").exists()


def partial_of(folder: Path, point: Point) -> Path:
    """Where a point is while it is begun and not finished."""
    return folder / f"{point.name}.partial"


def run_point(point: Point, common: RunConfig, folder: Path, keep_model: bool, seeds: Seeds | None = None) -> None:
    """Train one point, into folder/NAME.

    The work is done in NAME.partial and renamed at the end: a folder without .partial is a finished point, and a point
    that was killed starts again with an empty ledger; with the same seeds it does again what it did.
    """
    from experiments.simulation import CLIENT_APP
    from fedsim.engine.local import LocalGrid
    from server.app import train

    partial = partial_of(folder, point)
    shutil.rmtree(partial, ignore_errors=True)
    config = point.config(common, partial)
    partial.mkdir(parents=True)
    write_json(partial / "point.json", point.to_json())
    train(LocalGrid(CLIENT_APP, to_flat(config), workers=1), config, seeds=seeds)
    if not keep_model:
        shutil.rmtree(RunFolder(partial).model, ignore_errors=True)
    partial.rename(folder / point.name)


def attempt(point: Point, common: RunConfig, folder: Path, keep_model: bool, seeds: Seeds | None = None) -> Finished:
    """run_point, with a failure kept as text: one failing point does not lose the others.

    Raises:
        Stopped: When a signal asked to: no point is begun after that.
    """
    try:
        run_point(point, common, folder, keep_model, seeds)
    except Stopped:
        raise
    except Exception:
        return Finished(point, traceback.format_exc())
    return Finished(point, None)


def run_here(
    points: list[Point], common: RunConfig, folder: Path, keep_model: bool, seeds: Mapping[str, Seeds] = NO_SEEDS
) -> Iterator[Finished]:
    """One point after the other in this process, whose progress is shown below the point's name.

    Args:
        seeds: Of points by name, in place of those that would be drawn or derived.
    """
    for point in points:
        print(f"{point.name}:", file=sys.stderr, flush=True)
        yield attempt(point, common, folder, keep_model, seeds.get(point.name))


def run_on_ray(
    points: list[Point],
    common: RunConfig,
    folder: Path,
    keep_model: bool,
    slots: int,
    seeds: Mapping[str, Seeds] = NO_SEEDS,
    *,
    retries: int = 1,
) -> Iterator[Finished]:
    """Points as Ray tasks, each with the CPU cores and GPU share of one worker; yields them as they end.

    At most `slots` are submitted at a time, so that an interrupted sweep leaves few half-done points.

    Args:
        seeds: Of points by name, in place of those that would be drawn or derived.
        retries: How often a point is run again whose process died.
    """
    import ray

    from fedsim.engine.cluster import join_or_start, leave

    engine = common.engine
    slots = slots or _room(engine.cpus_per_worker, engine.gpus_per_worker)
    started = join_or_start(
        engine.address,
        workers=slots,
        cpus_per_worker=engine.cpus_per_worker,
        object_store_bytes=200 << 20,
        log_to_driver=False,
        start_seconds=engine.start_seconds,
        field="sweep.slots",
    )
    placed = ray.remote(num_cpus=engine.cpus_per_worker, num_gpus=engine.gpus_per_worker, max_retries=retries)
    task = placed(_limited)
    here = Whereabouts.of_this_process()
    waiting = list(points)
    running: dict[Any, Point] = {}
    try:
        while waiting or running:
            while waiting and len(running) < slots:
                point = waiting.pop(0)
                own = seeds.get(point.name)
                running[task.remote(point, common, folder.resolve(), keep_model, here, own)] = point
            done, _ = ray.wait(list(running))
            for reference in done:
                point = running.pop(reference)
                try:
                    yield ray.get(reference)
                except ray.exceptions.RayError as failure:
                    if isinstance(stopped := getattr(failure, "cause", None), Stopped):
                        raise stopped from None  # whoever asked all processes to end: no other point begins
                    # The whole process died (killed for memory, say): that point failed, the others go on.
                    yield Finished(point, str(failure))
    finally:
        if started:
            leave()


def _limited(
    point: Point, common: RunConfig, folder: Path, keep_model: bool, here: Whereabouts, seeds: Seeds | None
) -> Finished:
    """attempt, where the command was given, with as many threads as the task has cores."""
    import torch

    here.share()

    torch.set_num_threads(common.engine.cpus_per_worker)
    return attempt(point, common, folder, keep_model, seeds)


def _room(cpus: int, gpus: float) -> int:
    """Points at a time on this machine."""
    import torch

    room = max(1, cores_here() // cpus)
    return max(1, min(room, int(torch.cuda.device_count() / gpus))) if gpus else room
