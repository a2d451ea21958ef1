"""What the engine takes of a model: the layout of its trainable parameters, its device, its precision."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedsim.errors import Failure, InvalidInput


@dataclass(frozen=True, kw_only=True)
class ParameterLayout:
    """Where each trainable parameter lies in the flat vector.

    Frozen parameters (requires_grad=False) are not part of it, so they never travel. A parameter that two modules
    share appears once, under the name that `model.named_parameters()` gives it. Two layouts are equal if and only if
    names, order and shapes agree: server and client compare them before they exchange vectors.

    Attributes:
        names: Parameter names in the order of `model.named_parameters()`.
        shapes: Shape of each parameter.
        offsets: P_0 = 0 and the running sums of sizes; parameter i is flat[offsets[i]:offsets[i + 1]].
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, model: torch.nn.Module) -> "ParameterLayout":
        """The layout of a model's trainable parameters.

        Raises:
            InvalidInput: The model has no trainable parameter.
        """
        return cls.of_parameters(trainable_parameters(model))

    @classmethod
    def of_parameters(cls, named: dict[str, torch.nn.Parameter]) -> "ParameterLayout":
        """The same of the result of `trainable_parameters`."""
        offsets = [0]
        for parameter in named.values():
            offsets.append(offsets[-1] + parameter.numel())
        return cls(names=tuple(named), shapes=tuple(tuple(p.shape) for p in named.values()), offsets=tuple(offsets))

    @property
    def size(self) -> int:
        """Number of trainable values, P."""
        return self.offsets[-1]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of values of each parameter by name, in the order of the flat vector."""
        ends = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        return {name: stop - start for name, (start, stop) in zip(self.names, ends, strict=True)}

    def flatten(self, model: torch.nn.Module) -> torch.Tensor:
        """The trainable parameters end to end: a new float32 tensor [P] on the model's device."""
        named = self._parameters(model)
        flat = torch.empty(self.size, dtype=torch.float32, device=next(iter(named.values())).device)
        for name, view in self.views(flat).items():
            view.copy_(named[name].detach())
        return flat

    def load(self, model: torch.nn.Module, flat: np.ndarray | torch.Tensor) -> None:
        """Write flat [P] into the model's parameters, in place and in their own dtype.

        Raises:
            InvalidInput: flat has another size than the layout, or the model has other trainable parameters.
        """
        if flat.ndim != 1 or len(flat) != self.size:
            raise InvalidInput("flat", tuple(flat.shape), f"a vector of {self.size} values")
        named = self._parameters(model)
        with torch.no_grad():
            for name, start, stop in zip(self.names, self.offsets[:-1], self.offsets[1:], strict=True):
                # Copied piece by piece: torch refuses to share arrays that a read-only object store owns.
                piece = (
                    flat[start:stop] if isinstance(flat, torch.Tensor) else torch.from_numpy(flat[start:stop].copy())
                )
                named[name].copy_(piece.view(named[name].shape))

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of flat [P] by parameter name and in the parameter's shape; writing to one writes to flat."""
        return {
            name: flat[start:stop].view(shape)
            for name, shape, start, stop in zip(
                self.names, self.shapes, self.offsets[:-1], self.offsets[1:], strict=True
            )
        }

    def _parameters(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        named = trainable_parameters(model)
        if tuple((name, tuple(p.shape)) for name, p in named.items()) != tuple(
            zip(self.names, self.shapes, strict=True)
        ):
            raise InvalidInput(
                "model",
                type(model).__name__,
                "a model with the trainable parameters that this layout was made of",
                "Make the layout with ParameterLayout.of after adapters are added and parameters are frozen.",
            )
        return named


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """A model's parameters with requires_grad, shared ones once, in the order of the flat vector.

    Raises:
        InvalidInput: There is none.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise InvalidInput("model", type(model).__name__, "a model with at least one trainable parameter")
    return named


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast to dtype on device, or nothing where dtype is None; never chosen for the caller.

    Raises:
        InvalidInput: dtype is not bfloat16. float16 would need loss scaling, which the norm would have to undo.
    """
    if dtype is None:
        return nullcontext()
    if dtype != torch.bfloat16:
        raise InvalidInput("autocast", dtype, "torch.bfloat16 or None")
    return torch.autocast(device.type, dtype)


FLOAT32_PLACES = (
    ("generic", "all"),
    ("cuda", "all"),
    ("mkldnn", "all"),
    *((backend, kind) for backend in ("cuda", "mkldnn") for kind in ("matmul", "conv", "rnn")),
)
"""Where torch keeps how far it may round float32 operands (`torch.backends.….fp32_precision`), from the top: a place
that is "none" inherits from the "all" above it, and says what it inherited. They are read and written by the functions
under torch's public names, of which two are amiss: mkldnn's for all writes to generic, and cuda's rnn has none."""
_read_precision, _write_precision = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter

_settings_lock = threading.Lock()
_settings_before: list[Any] = []
_inside = 0
_tried: set[str] = set()


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Within it products of float32 numbers are of these numbers, not of their roundings to TF32 or bfloat16.

    A norm and the sum it bounds are products in different orders: operands rounded to TF32's 11 bits part them by 10⁻³
    where the clip's margin is 1.5 · 10⁻⁵. Whatever the caller or the environment allows (`allow_tf32`,
    `set_float32_matmul_precision`, `fp32_precision`) is put aside, and put back as it was. torch keeps these settings
    for the whole process: threads may be within at the same time, and the last one out puts them back. Autocast that
    the caller switched on around the call is off within.

    Args:
        device: Where the products are computed; the first time, one of them is tried there.

    Raises:
        Failure: Products are rounded all the same (a library's own environment variable), or somebody changed the
            settings meanwhile.
    """
    global _inside
    with _settings_lock:
        if not _inside:
            _settings_before[:] = _put_aside()
        _inside += 1
    try:
        with torch.autocast(device.type, enabled=False):
            _try_product(device)
            yield
        if any(_read_precision(*place) != _exact(place) for place in FLOAT32_PLACES):
            raise Failure(
                "The precision of float32 products was changed in torch while gradients were clipped, so norms may be "
                "wrong and their sum is of no use. Change it before or after."
            )
    finally:
        with _settings_lock:
            _inside -= 1
            if not _inside:
                _put_back(_settings_before)


def _exact(place: tuple[str, str]) -> str:
    """What makes a place round nothing: those above are emptied, so that what is read of those below is their own."""
    return "none" if place[1] == "all" else "ieee"


def _put_aside() -> list[Any]:
    """Make float32 products exact; returns what `_put_back` takes."""
    before: list[Any] = []
    for place in FLOAT32_PLACES:
        before.append(_read_precision(*place))
        _write_precision(*place, _exact(place))
    # The older settings are kept beside the newer ones, and torch refuses to read one that disagrees with the other.
    before.append(torch.get_float32_matmul_precision())
    try:
        before.append(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        before.append(True)  # the newer one says no by now
    before.append(torch.backends.cuda.matmul.allow_fp16_accumulation)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    for place in FLOAT32_PLACES:
        _write_precision(*place, _exact(place))
    return before


def _put_back(before: list[Any]) -> None:
    *places, matmul, cudnn, accumulation = before
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
    torch.backends.cuda.matmul.allow_fp16_accumulation = accumulation
    for place, precision in zip(FLOAT32_PLACES, places, strict=True):
        _write_precision(*place, precision)


def _try_product(device: torch.device) -> None:
    """Refuse a device whose products round float32 operands, found out by one product, once a device."""
    if device.type in _tried:
        return
    # 21 significant bits: any two bfloat16 numbers, or one of TF32, lose the last. Four terms add up exactly.
    value = 1 + 2.0**-12 + 2.0**-20
    left = torch.zeros(256, 256, dtype=torch.float32, device=device)
    left[:, :4] = value
    if not bool((left @ torch.ones_like(left) == 4 * value).all()):
        raise Failure(
            f"Matrix products of float32 numbers on {device.type} are rounded to fewer bits than float32 has, so the "
            "norms that privacy rests on would be wrong. Unset NVIDIA_TF32_OVERRIDE, ONEDNN_DEFAULT_FPMATH_MODE and "
            "DNNL_DEFAULT_FPMATH_MODE."
        )
    _tried.add(device.type)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what values of a dtype are added up: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_device(values: np.ndarray, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy of values on the device; on a GPU the caller does not wait for what was asked of it before."""
    tensor = torch.from_numpy(values).to(dtype)
    if torch.device(device).type != "cuda":
        return tensor.to(device, copy=True)
    return tensor.pin_memory().to(device, non_blocking=True)


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
    return device_of(p for p in model.parameters() if p.requires_grad)


def device_of(parameters: Iterable[torch.nn.Parameter]) -> torch.device:
    """The same of parameters; the CPU where there are none."""
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise InvalidInput("model", sorted(map(str, devices)), "on one device")
    return devices.pop() if devices else torch.device("cpu")


def accumulation_dtype(parameters: Iterable[torch.nn.Parameter]) -> torch.dtype:
    """float64 for trainable parameters that are float64, else float32."""
    dtypes = {p.dtype for p in parameters}
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


def pad_token_of(model: torch.nn.Module) -> int:
    """The token that fills rows: the model's own where it has one."""
    return getattr(getattr(model, "config", None), "pad_token_id", None) or 0
