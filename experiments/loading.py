"""A finished model for use: loaded as what it is, on the device that is there."""

import torch

from fedsim.errors import InvalidInput
from fedsim.models.described import described_model
from fedsim.models.load import LoadedModel, load_model
from fedsim.resources import computing_device


def loaded_for_use(path: str, device: str | None = None) -> LoadedModel:
    """A model, adapters on their base, or what a run exported.

    Args:
        path: Folder, or name on the hub.
        device: As torch names it; by default a GPU if there is one.

    Raises:
        InvalidInput: There is no such model or device.
    """
    config = described_model(path)
    try:
        place = computing_device() if device is None else torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or one that is not there
        raise InvalidInput("device", device, "cpu, or a GPU that is there", str(error).splitlines()[0]) from None
    return load_model(config, device=place)
