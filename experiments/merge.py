"""`merge`: a run's adapters, or anybody's, merged into their base."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from fedsim.disk import free_bytes, gigabytes, os_error
from fedsim.errors import Failure, InvalidInput
from fedsim.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Write LoRA adapters merged into the base that they belong to: a plain Hugging Face model, which needs neither
    PEFT nor the base. What was guaranteed of the adapters holds of it: it is computed from them."""

    path: Positional[str]
    """The folder of a run, or LoRA adapters by folder or name."""
    output: str
    """Folder for the merged model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What its weights are rounded to. Fine-tuning under privacy moves them little: in 16 bits some of it is lost."""

    def run(self) -> int:
        """Merge, compare losses before and after, and say where the model is."""
        from fedsim.models.adapters import require_plain_base, task_of
        from fedsim.models.classes import named_classes
        from fedsim.models.export import export_merged
        from fedsim.models.load import load_model
        from fedsim.models.sources import find_source
        from fedsim.privacy.earlier import MARK, digest_of
        from fedsim.resources import accounting_of
        from fedsim.statement import CARD, write_card

        if Path(self.output).exists():
            raise InvalidInput("output", self.output, "a folder that is not there yet")
        source = find_source(self.path)
        if source.adapters is None:
            raise InvalidInput("path", self.path, "adapters, or the folder of a run that trained some")
        require_plain_base(source)
        beside = accounting_of(source)  # what is spent on a model stays with it
        loaded = load_model(ModelConfig(path=self.path, **task_of(source)))
        marks = {MARK: digest_of(beside[0])} if beside else {}
        with _refusals_told(Path(self.output)), tempfile.TemporaryDirectory() as made:
            if beside:
                task, classes = loaded.config.task, named_classes(loaded.model)
                card = Path(made) / CARD
                write_card(beside[1], card, base=source.base, task=task, adapters=False, classes=classes)
                beside = (*beside, card)
            folder = export_merged(loaded, self.output, dtype=self.dtype, beside=beside, marks=marks)
        print(f"merged model: {folder}")
        return 0


@contextmanager
def _refusals_told(output: Path) -> Iterator[None]:
    """Within it what the disk refuses is told in a sentence.

    Raises:
        Failure: It refused something.
    """
    try:
        yield
    except (Failure, InvalidInput):
        raise
    except Exception as error:
        if (said := os_error(error)) is None:
            raise
        raise Failure(
            f"the merged model cannot be written to {output} ({said.strerror or said}); nothing of it is left there. "
            f"Make room ({gigabytes(free_bytes(output))} are free), or name another --output"
        ) from error
