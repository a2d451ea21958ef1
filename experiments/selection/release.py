"""The folder of the model that was selected, with what the selection guarantees in place of what its run says."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.config import RunConfig
from fedsim.privacy.earlier import ADAPTERS, MARK, digest_of
from fedsim.resources import Resources
from server.results.run_folder import RunFolder, write_json
from server.results.statement import write_card_of

SELECTED = "selected"
"""The folder that may be released, in the sweep's."""


def write_release(
    run: Path, folder: Path, ledger: Path, statement: Mapping[str, Any], config: RunConfig, resources: Resources | None
) -> None:
    """Write the released folder, whole or not at all: model, ledger, statement and card, and nothing else of the run.

    Losses without noise, settings of where and how it ran, and whatever else a run's folder has stay out.

    Args:
        run: The selected run's folder.
        folder: The released one.
        ledger: What was charged.
        statement: Of the selection.
        config: Of the run.
        resources: What the card is written from.
    """
    partial = RunFolder(folder.with_name(folder.name + ".partial"))
    shutil.rmtree(partial.path, ignore_errors=True)
    partial.path.mkdir(parents=True)
    shutil.copyfile(ledger, partial.ledger)
    write_json(partial.privacy, statement)
    if (run / "model").is_dir():
        copy_of_content(run / "model", partial.model)
        if resources is not None:
            write_card_of(partial, config, resources)
        for path in (partial.ledger, partial.privacy, partial.card):
            if path.exists():
                shutil.copyfile(path, partial.model / path.name)
        mark(partial.model, digest_of(partial.ledger))
    partial.path.rename(folder)


def copy_of_content(source: Path, target: Path) -> None:
    """Copy what files hold and no more of them: when they were written tells which of the runs was released."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            copy_of_content(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def mark(model: Path, digest: str) -> None:
    """Have a model's folder name the ledger that it now belongs to, where it named that of its run."""
    config, adapters = model / "config.json", model / ADAPTERS
    if config.exists():
        values = json.loads(config.read_text(encoding="utf-8"))
        if MARK in values:
            write_json(config, values | {MARK: digest})
    if adapters.exists():
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        with safe_open(adapters, framework="pt") as weights:
            said = weights.metadata() or {}
        save_file(load_file(adapters), adapters, metadata={**said, MARK: digest})
