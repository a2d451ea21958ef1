"""`push`: an exported model with its statement and card to the Hugging Face hub."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from fedsim.errors import Failure, InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.earlier import LEDGER, STATEMENT, Earlier
from fedsim.privacy.events import Adjacency
from fedsim.privacy.ledger import merged, read_entries
from fedsim.statement import CARD, REPRODUCIBLE_NOISE

RELEASED = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("adapter_config.json", "base_quantization.json"),
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model"),
    *(CARD, STATEMENT, LEDGER),
)
"""Names of what is uploaded; anything else that lies in the folder is not."""
TOLERANCE = 1e-6
"""How far below what the ledger gives again the stated ε may lie, relatively: rounding on other machines."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """Upload an exported model, its privacy statement, ledger and card. Nothing else of the run leaves: no metrics, no
    configuration, no seeds, no data."""

    folder: Positional[str]
    """The folder of a finished run, or its model."""
    repo: Positional[str]
    """The repository: OWNER/NAME. It is made if there is none."""
    public: bool = False
    """Make a new repository public; by default it is private."""
    message: str = "Upload a model with its privacy statement"
    """The commit's message."""
    without_guarantee: bool = False
    """Upload although no certified statement lies beside the model, or it says that the model must not be released."""

    def run(self) -> int:
        """Check, upload, say where it is."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

        folder = _model(self.folder)
        if not self.without_guarantee:
            require_certified(folder)
        files, left = released_files(folder)
        for name in left:
            print(f"not uploaded: {name}")
        api: Any = HfApi()
        try:
            api.create_repo(self.repo, private=not self.public, exist_ok=True)
            api.upload_folder(
                repo_id=self.repo, folder_path=str(folder), allow_patterns=files, commit_message=self.message
            )
        except (HFValidationError, LocalTokenNotFoundError) as error:
            hint = f"The hub's client said: {str(error).splitlines()[0]}"
            raise InvalidInput("repo", self.repo, "OWNER/NAME, and a login (hf auth login)", hint) from None
        except (HfHubHTTPError, OSError) as error:
            raise Failure(f"the hub did not take {self.repo}: {str(error).splitlines()[0]}") from error
        print(f"uploaded: https://huggingface.co/{self.repo} ({', '.join(files)})")
        return 0


def released_files(folder: Path) -> tuple[list[str], list[str]]:
    """Names of what is uploaded of a model's folder, and of what is left out of it."""
    everything = sorted(path for path in folder.iterdir())
    files = [path.name for path in everything if path.is_file() and any(path.match(name) for name in RELEASED)]
    return files, [path.name for path in everything if path.name not in files]


def require_certified(folder: Path) -> None:
    """Refuse a model of which no guarantee is certified.

    Raises:
        InvalidInput: Its statement or ledger is missing, is not what was written, states no finite ε or a smaller one
            than the ledger gives, or says that the model must not be released.
    """
    hint = "Add --without-guarantee to upload it all the same."
    try:
        said = json.loads((folder / STATEMENT).read_text(encoding="utf-8"))
        private, adjacency = bool(said["private"]), Adjacency(said["adjacency"])
        upper, delta, not_covered = said["epsilon"]["upper"], float(said["delta"]), said["not_covered"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        allowed = f"a model with its statement, {STATEMENT}"
        raise InvalidInput("folder", str(folder), allowed, f"Reading it said: {error}. {hint}") from None
    if not private or upper is None or not math.isfinite(upper):
        raise InvalidInput("folder", str(folder), "a model with a guarantee: its statement gives none", hint)
    if REPRODUCIBLE_NOISE in not_covered:
        allowed = "a model whose noise nobody knows: its statement says that it must not be released"
        raise InvalidInput("folder", str(folder), allowed, hint)
    Earlier.of_model(str(folder), adjacency=adjacency)  # which reads both files, and refuses what does not agree
    again = epsilon_bounds(
        merged(entry.event for entry in read_entries(folder / LEDGER)), delta, adjacency=adjacency
    ).upper
    if again > upper * (1 + TOLERANCE):
        allowed = f"a model whose statement is of its ledger, which gives ε = {again:g} and not {upper:g}"
        raise InvalidInput("folder", str(folder), allowed, hint)


def _model(path: str) -> Path:
    """The folder with the model itself.

    Raises:
        InvalidInput: It is no folder of a model, or holds adapters whose base only this machine has.
    """
    from fedsim.models.sources import find_source

    if not Path(path).expanduser().is_dir():
        raise InvalidInput("folder", path, "a folder that exists")
    source = find_source(path)
    if source.adapters and Path(source.base).exists():
        hint = f"Write one that needs no base first: merge {path} --output FOLDER, and push that."
        raise InvalidInput("folder", path, "adapters on a base that others can load", hint)
    folder = Path(source.adapters or source.base)
    if not any(folder.glob("*.safetensors")):
        raise InvalidInput("folder", path, "the folder of a finished run, or of a model with safetensors weights")
    return folder
