"""A second device on a machine without a GPU: tensors that say they lie on `cuda:0`, and hold real values.

A CPU computes what is asked of them. What a GPU refuses is refused here too, with `DeviceMismatch`: an operation one
of whose tensors was left on the host, numpy asked for values that are not the host's. Where `device=` is forgotten a
test therefore fails on any machine, with or without a GPU.

How it works: a `DeviceTensor` wraps a tensor of the CPU. torch's own layers (autograd, views, versions) take it for
one of the device "meta", on which they compute nothing; each operation then arrives at `_computed`, which looks at its
tensors and passes it on. Python sees `cuda:0`, which is what our code asks for. Autocast knows neither, and is acted.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
functional = torch.nn.functional

DEVICE = torch.device("cuda", 0)  # what tensors say
UNDERNEATH = "meta"
"""What torch's own layers take them for. A tensor that these make by the way is on the device, too."""

CROSSING = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default, aten._foreach_copy_.default}
"""What brings values from one device to another."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""What takes indices from the host as well: a GPU waits while they are brought there."""
MEMORY = 1 << 30  # bytes that the device says are free


class DeviceMismatch(RuntimeError):
    """An operation that no device would do, because some of its tensors lie elsewhere."""


class DeviceTensor(torch.Tensor):
    """A tensor on the second device.

    Args:
        values: What it holds, a tensor of the CPU, whose memory it shares.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "DeviceTensor":
        assert values.device.type == "cpu"
        assert not isinstance(values, DeviceTensor)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=UNDERNEATH,
        )
        made.values = values
        return made

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        raise NotImplementedError("the values under a DeviceTensor cannot be exchanged")

    def get_device(self) -> int:
        return 0

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
        if device is not None and device.type == "cuda":  # underneath it is none, and all of it would be copied
            others = {name: kwargs[name] for name in ("copy", "non_blocking", "memory_format") if name in kwargs}
            return super().to(dtype or self.dtype, **others)
        return super().to(*args, **kwargs)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, values: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(values, **{"dtype": self.dtype, "device": DEVICE, **kwargs})

    def __format__(self, form: str) -> str:
        return format(self.item() if not self.ndim else repr(self), form)

    def __repr__(self, **_: Any) -> str:
        return f"{self.values!r} on {DEVICE}"

    def numpy(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise _noted(f"numpy cannot read a tensor {tuple(self.shape)} of {DEVICE}: bring it to the host first")

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


_met = SimpleNamespace(mismatches=[], host_indices=[])
"""Mismatches since the device was made, and operations that a GPU would have waited for indices of."""


def _noted(message: str) -> DeviceMismatch:
    """An error that is remembered, for code that goes another way when torch refuses something."""
    _met.mismatches.append(DeviceMismatch(message))
    return _met.mismatches[-1]


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation returns, on the device that it belongs to.

    Raises:
        DeviceMismatch: It belongs to none.
    """
    tensors = list(_tensors((*args, *kwargs.values())))
    ours = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    asked = kwargs.get("device")
    here = bool(ours) if asked is None else torch.device(asked).type in (DEVICE.type, UNDERNEATH)
    if ours and len(ours) < len(tensors):
        _check(func, args, tensors)
    if asked is not None and here:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner, named = (
        _changed(given, lambda t: t.values if isinstance(t, DeviceTensor) else t) for given in (args, kwargs)
    )
    try:
        found = _on_the_cpu(func)(*inner, **named)
    except IndexError as error:  # on a GPU nothing works after it
        raise _noted(f"{func}: {error}") from error
    if any(tensor.values.shape != tensor.shape or tensor.values.stride() != tensor.stride() for tensor in ours):
        raise NotImplementedError(f"{func} changed the shape of a DeviceTensor in place")
    if not here:
        return found
    same = {id(tensor.values): tensor for tensor in ours}  # what is written to is returned itself
    return _changed(found, lambda tensor: same[id(tensor)] if id(tensor) in same else DeviceTensor(tensor))


def _tensors(given: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments, and in lists among them."""
    for value in given:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _changed(given: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same with other tensors. torch's own way to do so is several times slower."""
    if isinstance(given, torch.Tensor):
        return change(given)
    if type(given) in (list, tuple):
        return type(given)([_changed(value, change) for value in given])
    return {name: _changed(value, change) for name, value in given.items()} if type(given) is dict else given


def _on_the_cpu(func: Any) -> Callable[..., Any]:
    """An operation that a GPU has and a CPU lacks, or the operation itself."""
    if func is aten._pin_memory.default:
        return lambda tensor, *_, **__: tensor.clone()
    if func in (aten.mm.dtype, aten.bmm.dtype):  # products of bfloat16 that are added up and kept in float32
        return lambda left, right, dtype: torch.matmul(left.to(dtype), right.to(dtype))
    return func  # type: ignore[no-any-return]


def _check(func: Any, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
    """Refuse what a GPU refuses of an operation on tensors of both devices."""
    if func in CROSSING:
        return
    if func in INDEXING and isinstance(args[0], DeviceTensor):
        if any(isinstance(index, torch.Tensor) and not isinstance(index, DeviceTensor) for index in args[1]):
            _met.host_indices.append(func)
        tensors = [args[0], *args[2:3]]
    # Numbers of the host are read by an arithmetic operation, but not written to.
    numbers = torch.Tag.pointwise in func.tags or func in INDEXING
    written = args[0] if func._schema.is_mutable and isinstance(args[0], torch.Tensor) else None
    for tensor in tensors:
        if not isinstance(tensor, DeviceTensor) and (not numbers or tensor.ndim or tensor is written):
            shapes = ", ".join(f"{tuple(t.shape)} of {t.device}" for t in tensors)
            raise _noted(f"{func} of tensors that are not on one device: {shapes}")


class _Operations(TorchDispatchMode):
    """Sees operations that are given no tensor: what makes one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():
            with self:  # what operations are made of is seen; without autograd they arrive whole
                found = func.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return _computed(func, args, kwargs or {})


class _Generator(torch.Generator):
    """A generator that draws for the device that it was made for, and for no other."""

    place: str

    def __new__(cls, device: torch.device | str = "cpu") -> "_Generator":
        made = super().__new__(cls, device="cpu")
        made.place = torch.device(device).type
        return made


HALVED = {
    functional.linear, functional.scaled_dot_product_attention, functional.conv1d, functional.conv2d, torch.einsum,
    *(getattr(place, name) for place in (torch, torch.Tensor)
      for name in ("matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm")),
    torch.Tensor.__matmul__, torch.Tensor.__rmatmul__,
}  # fmt: skip
"""What autocast computes in its dtype."""
WIDENED = {
    functional.layer_norm, torch.layer_norm, functional.cross_entropy, functional.softmax, functional.log_softmax,
    *(getattr(place, name) for place in (torch, torch.Tensor)
      for name in ("softmax", "log_softmax", "exp", "log", "pow", "rsqrt", "sum", "cumsum", "norm", "prod")),
}  # fmt: skip
"""What it computes in float32."""


class _Calls(TorchFunctionMode):
    """What must be known before torch's own layers see a call: autocast, and calls that would not reach it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _numbered(value) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.to:
            args = tuple(map(_numbered, args))
        if (generator := kwargs.get("generator")) is not None:
            place = (
                args[0].device if isinstance(args[0], torch.Tensor) else torch.device(kwargs.get("device") or "cpu")
            )
            if place.type != getattr(generator, "place", "cpu"):
                raise _noted(f"{func.__name__} on {place} with a generator of another device")
        if func is torch.as_tensor and isinstance(args[0], DeviceTensor):
            return args[0].to(**{name: kwargs[name] for name in ("device", "dtype") if name in kwargs})
        if kwargs.get("out") is not None:
            if func is torch.matmul:  # torch changes the shape of the tensor given, and back
                result = func(*args)
                if type(result) is not type(kwargs["out"]):
                    raise _noted("matmul writes to a tensor of another device")
                return kwargs["out"].copy_(result)
        elif torch.is_autocast_enabled(DEVICE.type) and (func in HALVED or func in WIDENED):
            dtype = torch.get_autocast_dtype(DEVICE.type) if func in HALVED else torch.float32
            args, kwargs = (_changed(given, functools.partial(_cast, dtype=dtype)) for given in (args, kwargs))
        return func(*args, **kwargs)


def _numbered(value: Any) -> Any:
    """`cuda` as `cuda:0`: torch asks a GPU for its number."""
    return DEVICE if isinstance(value, str | torch.device) and str(value) == DEVICE.type else value


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As autocast casts an argument: where it lies on the device, and is narrower than float64."""
    ours = isinstance(tensor, DeviceTensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if ours else tensor


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its parameters and buffers on the device; those that were shared still are."""
    seen: dict[int, torch.Tensor] = {}

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, DeviceTensor):
            return tensor
        there: torch.Tensor = DeviceTensor(tensor.detach())
        return torch.nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else there

    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = seen.setdefault(id(tensor), one(tensor))
    return module


def _module_to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type != DEVICE.type:
        return _plain_to(module, *args, **kwargs)
    return moved(module if dtype is None else _plain_to(module, dtype))


_plain_to = torch.nn.Module.to

_CUDA: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "_exchange_device": lambda index: 0,
    "_maybe_exchange_device": lambda index: 0,
    "mem_get_info": lambda *_: (MEMORY, MEMORY),
    "empty_cache": lambda: None,
    "synchronize": lambda *_: None,
    "reset_peak_memory_stats": lambda *_: None,
    **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated"), lambda *_: 0),
}
"""What torch says of the device and does for it."""


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Within it this thread has a device `cuda:0`.

    Raises:
        DeviceMismatch: On leaving, where there was one that somebody caught: a way around it is a fault, too.
    """
    _met.mismatches.clear()
    _met.host_indices.clear()
    lifting = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        for name, stand_in in _CUDA.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        stack.enter_context(patch.object(torch.nn.Module, "to", _module_to))
        stack.enter_context(patch.object(torch, "Generator", _Generator))
        # Of torch.tensor(…, device=…) the mode then sees how values come to the device.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifting)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # the device has no thread of its own
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # every operation comes by way of Python, and has little to do
        stack.enter_context(_Calls())
        stack.enter_context(_Operations())
        yield DEVICE
    if _met.mismatches:
        raise _met.mismatches[0]


@contextmanager
def any_device() -> Iterator[torch.device]:
    """This machine's GPU; where it has none, the second device."""
    if torch.cuda.is_available():
        yield DEVICE
        return
    with second_device() as device:
        yield device
