"""`fine_tune`: one run from Python, and what `train` calls."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.face.arguments import configured, require_known, spelt_for_python
from experiments.face.outcomes import FineTuned
from fedsim.config import RunConfig
from fedsim.errors import InvalidInput
from server.results.run_folder import RunFolder, new_output_folder


def fine_tune(
    model: Any = "default",
    rows: Any = None,
    *,
    tokenizer: Any = None,
    objective: Any = None,
    epsilon: float | None = None,
    delta: float | None = None,
    rounds: int | None = None,
    gradients_per_round: int | None = None,
    algorithm: str | None = None,
    group_size: int | None = None,
    clip_norm: float | None = None,
    learning_rate: float | None = None,
    workers: int | None = None,
    callbacks: Sequence[Any] = (),
    output: str | Path | None = None,
    resume: str | Path | None = None,
    **options: Any,
) -> FineTuned:
    """Fine-tune a language model so that nobody can tell whether any one user's rows were in it.

    Args:
        model: A Hugging Face model or adapters by name or folder; "default", a small GPT-2 pre-trained on public text;
            a model of transformers or any torch module as an object, with its tokenizer; or an earlier result, to go
            on from it (its ε is counted). An object is copied, and stays as it is.
        rows: The users' text: dicts with a `user_id` and a `text` in any iterable, a dict of columns, a DataFrame, an
            Arrow table, a Hugging Face Dataset; the path of JSONL, CSV or Parquet files or of a prepared store. Other
            columns are named by user_column, text_column, prompt_column, messages_column, label_column. By default
            docstrings of installed packages, by module.
        tokenizer: The tokenizer of a model that is given as an object.
        objective: What such a model is trained by, where that is one's own (`fedsim.Objective`).
        epsilon: Limit on the user-level ε that training may spend; 8 by default.
        delta: The δ that goes with it, below one over the number of users; 1e-5 by default.
        rounds: Rounds, each a step of the optimizer.
        gradients_per_round: Examples whose gradients are computed in a round, in expectation.
        algorithm: "uls", users are drawn and their updates clipped; or "els", examples are.
        group_size: Examples of one user, each round (uls) or in the whole run (els).
        clip_norm: Bound on the L2 norm of what is clipped.
        learning_rate: The server's peak learning rate.
        workers: Ray actors to compute on. By default none: the run computes in this process, on its GPU where there is
            one.
        callbacks: Told of each round; see `fedsim.Callback`.
        output: Folder for the results; by default a new one under runs/.
        resume: Folder of an unfinished run to go on with. Its settings are its own.
        options: Every other field of `fedsim.RunConfig` by its name, or by that of its group and its own:
            `lora_rank=8`, `sequence_length=128`, `optimizer_name="sgd"`, `noise_secure=True`, `release=True`.

    Returns:
        The finished run: `.model`, `.tokenizer`, `.metrics`, `.statement`, `.folder`.

    Raises:
        InvalidInput: Something that was given is not allowed; nothing is spent.
        Failure: What failed; what was charged stays charged, and the run can be resumed.
        Stopped: After Ctrl-C, at the end of the round; the run can be resumed.
    """
    given = {
        "epsilon": epsilon,
        "delta": delta,
        "rounds": rounds,
        "gradients_per_round": gradients_per_round,
        "algorithm": algorithm,
        "group_size": group_size,
        "clip_norm": clip_norm,
        "learning_rate": learning_rate,
        "workers": workers,
        "output": None if output is None else str(output),
    }
    with spelt_for_python(RunConfig):
        config = configuration(RunConfig, model, rows, tokenizer, objective, resume, given | options)
        return trained(config, callbacks)


def configuration(
    kind: type,
    model: Any,
    rows: Any,
    tokenizer: Any,
    objective: Any,
    resume: str | Path | None,
    options: dict[str, Any],
) -> Any:
    """A command's configuration from objects and keywords.

    Raises:
        InvalidInput: Something that was given is not allowed.
    """
    from experiments.face.objects import model_options, rows_options

    require_known(kind, options)
    begun = None
    if resume is not None:
        from experiments.resume import resumed

        begun = resumed(kind, ["--resume", str(resume)])
    objects: dict[str, Any] = {}
    if begun is None or not (isinstance(model, str) and model == "default"):
        objects |= model_options(model, tokenizer, objective)
    objects |= rows_options(rows, options)
    for name in objects:
        if options.get(name) is not None:
            raise InvalidInput(name, options[name], f"left out beside {name.split('_')[0]}")
    if begun is None and options.get("engine_kind") is None:
        options = {**options, "engine_kind": "ray" if options.get("workers") else "local"}
        if not options.get("workers"):
            options["workers"] = None if options.get("engine_workers") else 1
    return configured(kind, {**options, **objects}, begun)


def trained(config: RunConfig, callbacks: Sequence[Any] = ()) -> FineTuned:
    """Run what a configuration says.

    Args:
        config: A run, new or to go on with.
        callbacks: As for fine_tune.

    Raises:
        As fine_tune.
    """
    from experiments.simulation import simulated_clients
    from fedsim.models.sources import find_source
    from fedsim.resources import earlier_runs
    from server.app import train
    from server.callbacks import require_callbacks

    require_callbacks(config)
    output = config.resume or config.output or new_output_folder(config.plan.algorithm)
    if config.resume is None and Path(config.model.path).expanduser().is_dir():
        earlier_runs(config, find_source(config.model.path))  # a spent budget is found before anything is begun
    if config.resume is None:
        RunFolder(output).require_unused()  # before anything is computed
    config = dataclasses.replace(config, output=output)
    with simulated_clients(config) as grid:
        train(grid, config, callbacks)
    return FineTuned(Path(output))
