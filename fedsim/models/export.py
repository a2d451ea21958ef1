"""Save a fine-tuned model in the formats that others read, and prove that what was saved is what was trained."""

import copy
import dataclasses
import errno
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

from fedsim.disk import force
from fedsim.errors import Failure, InvalidInput
from fedsim.models.adapters import resize_tokens
from fedsim.models.evaluate import evaluate
from fedsim.models.given import load_own, save_own
from fedsim.models.load import LoadedModel, embedded_tokens
from fedsim.models.merge import merge
from fedsim.models.quantised import multiply_as_stored, quantising, write_quantisation
from fedsim.models.quiet import quiet_transformers
from fedsim.models.refusals import AUTO_CLASSES, OWN_CODE
from fedsim.models.sources import BASE
from fedsim.rows import TokenRows, with_prompts

TOLERANCE = 1e-5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCES = {"float32": TOLERANCE, "float16": 1e-3, "bfloat16": 1e-2}
"""How far a loss may be off, relatively, by what weights are rounded to: each moves by 2⁻²⁵, 2⁻¹² or 2⁻⁹ of itself."""
NO_MARKS: Mapping[str, str] = MappingProxyType({})


class ExportMismatch(Failure):
    """The export, read back, does not compute the losses of the model that was exported.

    Attributes:
        trained: Loss of the model in memory, nats per label.
        exported: Loss of the model read back.
    """

    def __init__(self, trained: float, exported: float) -> None:
        self.trained, self.exported = trained, exported
        super().__init__(f"the exported model's loss is {exported!r}, the trained model's {trained!r}")

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.trained, self.exported)


def export(
    loaded: LoadedModel,
    folder: str | Path,
    *,
    rows: TokenRows | None = None,
    beside: Sequence[Path] = (),
    marks: Mapping[str, str] = NO_MARKS,
) -> Path:
    """Write the model to a folder: Hugging Face's format, or PEFT's for adapters; safetensors and tokenizer.

    Where its configuration asks for it, adapters are merged (`export_merged`) in a copy: `loaded` is as it was.

    The folder is read back and must give the trained model's loss on the rows. It appears complete and checked, or
    not at all; a folder that is there already is replaced then.

    Args:
        loaded: The model, with the weights that are to be saved.
        folder: Where to.
        rows: Rows for the check; by default random tokens, the same ones each time. They are not stored.
        beside: Files that the model is not to be without wherever it is copied to: they are copied into the folder.
        marks: What the model is to say of itself beside what its format has: in its config.json; for adapters, which
            have none, in the header of their weights.

    Returns:
        The folder.

    Raises:
        InvalidInput: The folder cannot be made.
        OSError: The disk is full; or another exception, where a library says so in words (`fedsim.disk.os_error`).
        ExportMismatch: The losses differ by more than 1e-5, relatively.
    """
    if loaded.config.export == "merged":
        # What is tried before training is trained then, and what the disk refuses is exported again.
        apart = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))
        return export_merged(apart, folder, rows=rows, beside=beside, marks=marks)
    rows = probe_rows(loaded) if rows is None else rows
    return _written(
        loaded, folder, rows, evaluate(loaded.model, rows, loaded.objective).loss, TOLERANCE, beside, marks
    )


def export_merged(
    loaded: LoadedModel,
    folder: str | Path,
    *,
    dtype: str = "float32",
    rows: TokenRows | None = None,
    beside: Sequence[Path] = (),
    marks: Mapping[str, str] = NO_MARKS,
) -> Path:
    """Write a model with adapters as a plain one, in which they are merged; `loaded` is of no use afterwards.

    Args:
        loaded: The model, with the adapters that are to be merged.
        folder: Where to.
        dtype: What the weights are kept in: float32, bfloat16 or float16.
        rows: Rows for the check, as for `export`.
        beside: Files that are copied into the folder, as for `export`.
        marks: As for `export`.

    Returns:
        The folder.

    Raises:
        InvalidInput: The folder cannot be written, or the model cannot be merged (`merge`).
        ExportMismatch: The merged model, read back, has a loss that differs from that of the adapters on their base by
            more than rounding to dtype accounts for (`TOLERANCES`).
    """
    if dtype not in DTYPES:
        raise InvalidInput("dtype", dtype, "one of " + ", ".join(DTYPES))
    rows = probe_rows(loaded) if rows is None else rows
    trained = evaluate(loaded.model.float(), rows, loaded.objective).loss
    merged = merge(loaded)
    # Before it is rounded: of 16 bits nobody could tell what was lost by rounding from what merging left out.
    _require_same(trained, evaluate(merged.model, rows, loaded.objective).loss, TOLERANCE)
    merged.model.to(DTYPES[dtype])
    return _written(merged, folder, rows, trained, TOLERANCES[dtype], beside, marks)


def _written(
    loaded: LoadedModel,
    folder: str | Path,
    rows: TokenRows,
    trained: float,
    tolerance: float,
    beside: Sequence[Path],
    marks: Mapping[str, str],
) -> Path:
    folder = Path(folder).absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InvalidInput("output", str(folder), f"a folder that can be written ({error.strerror})") from error
    try:
        with quiet_transformers():
            _save(loaded, unfinished, marks)
            _check(loaded, unfinished, rows, trained, tolerance)
        _name_base(loaded, unfinished, folder)
        base = str(folder / BASE) if (unfinished / BASE).exists() else loaded.base
        write_quantisation(loaded.config, base, unfinished)
        for path in beside:
            shutil.copy(path, unfinished)
        os.chmod(unfinished, 0o755)
        force(unfinished)
        _replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def read_export(loaded: LoadedModel, folder: Path) -> Any:
    """The model in an export of `loaded`, read back as anyone would, on the device of `loaded`."""
    if loaded.given:
        return load_own(copy.deepcopy(loaded.model), folder)
    kind = AUTO_CLASSES[loaded.config.task]
    dtype = getattr(torch, loaded.config.base_dtype)
    if not loaded.adapted:
        model = kind.from_pretrained(folder, use_safetensors=True, dtype=dtype, **OWN_CODE)
    else:
        from peft import PeftModel  # here, see lora.has_adapters

        own = folder / BASE
        source = loaded.source
        further = quantising(loaded.config) | OWN_CODE
        further |= {"local_files_only": source.cached, "revision": source.revision}
        if loaded.config.task == "sequence-classification":
            further["num_labels"] = loaded.config.num_labels
        base = kind.from_pretrained(own if own.exists() else loaded.base, use_safetensors=True, dtype=dtype, **further)
        multiply_as_stored(base)
        base.config.pad_token_id = loaded.pad_token
        resize_tokens(base, load_file(folder / ADAPTER_SAFE_WEIGHTS_NAME))
        model = PeftModel.from_pretrained(base, folder)
    return model.to(next(loaded.model.parameters()).device).eval()


def probe_rows(loaded: LoadedModel, count: int = 16, length: int = 32) -> TokenRows:
    """Rows of random tokens (and random classes for a classifier): public, and sensitive to every weight."""
    generator = np.random.default_rng(0)
    length = min(length, loaded.context or length)
    # Some tokenizers know tokens that the model has no row for (Gemma 3's of an image).
    tokens = generator.integers(0, embedded_tokens(loaded), (count, length))
    classes = generator.integers(0, loaded.config.num_labels, count)
    rows = TokenRows.from_lists(tokens.tolist(), classes if loaded.config.task == "sequence-classification" else None)
    return with_prompts(rows) if loaded.config.reads_apart else rows


def _save(loaded: LoadedModel, folder: Path, marks: Mapping[str, str]) -> None:
    if loaded.given:
        save_own(loaded.model, folder, **marks)
        loaded.tokenizer.save_pretrained(folder)
        return
    model: Any = loaded.model
    for name, mark in marks.items():
        setattr(model.config, name, mark)
    before, model.config.pad_token_id = model.config.pad_token_id, loaded.pad_token
    try:
        model.save_pretrained(folder)
    finally:
        model.config.pad_token_id = before
    # PEFT adds a model card with nothing but blanks to fill in.
    (folder / "README.md").unlink(missing_ok=True)
    if loaded.adapted and marks:
        weights = folder / ADAPTER_SAFE_WEIGHTS_NAME
        save_file(load_file(weights), weights, metadata={"format": "pt", **marks})
    loaded.tokenizer.save_pretrained(folder)
    if loaded.adapted and loaded.source.carried:
        shutil.copytree(loaded.base, folder / BASE)


def _check(loaded: LoadedModel, folder: Path, rows: TokenRows, trained: float, tolerance: float) -> None:
    _require_same(trained, evaluate(read_export(loaded, folder), rows, loaded.objective).loss, tolerance)


def _require_same(trained: float, exported: float, tolerance: float) -> None:
    if not abs(exported - trained) <= tolerance * abs(trained):
        raise ExportMismatch(trained, exported)


def _name_base(loaded: LoadedModel, unfinished: Path, folder: Path) -> None:
    """Adapters name the base that they belong to: the copy beside them, once it is in place."""
    if (unfinished / BASE).exists():
        adapters: Any = loaded.model
        settings = adapters.peft_config["default"]
        before, settings.base_model_name_or_path = settings.base_model_name_or_path, str(folder / BASE)
        try:
            settings.save_pretrained(unfinished)
        finally:
            settings.base_model_name_or_path = before


def _replace(unfinished: Path, folder: Path) -> None:
    """Put the finished folder in place of an older one."""
    if not folder.exists():
        os.rename(unfinished, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    os.rename(folder, old)
    os.rename(unfinished, folder)
    shutil.rmtree(old)
