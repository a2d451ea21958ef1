"""In which precision a model runs, and that its gradients are a function of the data alone."""

from contextlib import AbstractContextManager, nullcontext

import torch

from fedsim.errors import InvalidInput


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to dtype on device, or nothing where dtype is None; never chosen for the caller.

    Raises:
        InvalidInput: dtype is not bfloat16. float16 would need loss scaling, which the norm would have to undo.
    """
    if dtype is None:
        return nullcontext()
    if dtype != torch.bfloat16:
        raise InvalidInput("autocast", dtype, "torch.bfloat16 or None")
    return torch.autocast(device.type, dtype)


def keeps_half(model: torch.nn.Module, autocast: torch.dtype | None) -> bool:
    """Whether activations may be kept in bfloat16 or float16."""
    return autocast is not None or any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which a matrix product of the tensor would run here: autocast's if it is on, else its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def model_device(model: torch.nn.Module) -> torch.device:
    """The device of the model's trainable parameters.

    Raises:
        InvalidInput: They lie on several devices.
    """
    devices = {p.device for p in model.parameters() if p.requires_grad}
    if len(devices) > 1:
        raise InvalidInput("model", sorted(map(str, devices)), "on one device")
    return devices.pop() if devices else torch.device("cpu")


def accumulation_dtype(model: torch.nn.Module) -> torch.dtype:
    """float64 for a model whose trainable parameters are float64, else float32."""
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    return torch.float64 if dtypes == {torch.float64} else torch.float32


def check_deterministic(model: torch.nn.Module) -> None:
    """Refuse a model whose rows' gradients depend on chance or on each other.

    Evaluation mode is always right. Training mode is accepted (activation checkpointing needs it in Hugging Face
    models) where every dropout is 0 and no layer computes statistics over the batch.

    Raises:
        InvalidInput: Dropout is on, or a batch normalisation would mix the rows of different units.
    """
    if not any(module.training for module in model.modules()):
        return
    hint = "Call model.eval(); or keep training mode for activation checkpointing and set every dropout to 0."
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.training:
            raise InvalidInput("model", f"{name} in training mode", "without statistics over the batch", hint)
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise InvalidInput("model", f"{name} with p={module.p} in training mode", "without dropout", hint)
        # Attention layers often apply their dropout in a function call and keep its rate as a number.
        for key, rate in vars(module).items():
            if module.training and "drop" in key and isinstance(rate, float) and rate > 0:
                raise InvalidInput("model", f"{name}.{key}={rate} in training mode", "without dropout", hint)
