"""Whether the Hugging Face hub can be reached, and single files from it."""

from pathlib import Path
from typing import Literal

SECONDS = 10.0


def hub_failure(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Why the hub does not answer; None where it does, whatever it says about the name.

    Asked once. The libraries ask six times, over a minute or more, before they say that there is no network, and have
    no option for it: too long to wait for somebody who mistyped a name.

    Args:
        name: A model or data set; the hub answers for mirrors and private ones too.
        kind: Which of them.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        get_hf_file_metadata(hf_hub_url(name, "README.md", repo_type=kind), timeout=SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return None  # It answered, or the name is none: the library says what is wrong.
    except Exception as error:  # Those of whichever HTTP library the hub's client uses.
        return f"{type(error).__name__}: {error}"
    return None


def hub_file(name: str, file: str, *, cached: bool, revision: str | None = None) -> Path | None:
    """A file of a model's repository, from this machine's cache or the hub; None where neither has it.

    Args:
        name: The model.
        file: The file's path within its repository.
        cached: Whether the hub does not answer, so that it need not be asked.
        revision: Branch, tag or commit; by default the main branch.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, file, revision=revision, local_files_only=cached))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None
