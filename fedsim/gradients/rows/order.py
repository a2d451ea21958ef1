"""Whose vectors are those of a tensor without an axis of rows: followed from where that is plain."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

RESHAPES = frozenset({"view", "reshape", "flatten", "squeeze", "contiguous"})
"""Functions that keep elements in their order, the last axis fastest."""
POOLS = frozenset({"__getitem__", "select", "sum", "mean", "amax"})
"""Functions that leave one vector of each row."""
PRODUCTS = {"linear": 0, "layer_norm": 0, "rms_norm": 0, "matmul": 0, "__matmul__": 0, "mm": 0, "addmm": 1}
"""Functions that treat each vector of one argument alike, and which argument that is."""
POINTWISE = frozenset({
    "relu", "gelu", "silu", "mish", "elu", "selu", "leaky_relu", "softplus", "hardtanh", "tanh", "sigmoid", "softmax",
    "dropout", "abs", "neg", "exp", "log", "sqrt", "rsqrt", "square", "pow", "clamp", "add", "radd", "sub", "rsub",
    "mul", "rmul", "div", "truediv", "true_divide", "to", "type", "type_as", "float", "double", "half", "bfloat16",
    "clone", "detach", "masked_fill", "chunk", "split", "cat", "mean", "sum", "amax", "__getitem__",
})  # fmt: skip
"""Functions that make each vector of the vectors at the same place; in place or as operators, too."""


class RowOrder(TorchFunctionMode):
    """Within it, which two-dimensional tensors hold vectors of one row after the other.

    A layer called with [N, d] may be called with the tokens of all rows end to end, with one vector of each row, or
    with whatever tokens a router chose, in an order that depends on the data; N tells these apart only by luck, and
    no trial on other data can. So order is followed from where it is plain: [rows, …, d] reshaped, or pooled over the
    middle, and then any function that is known to keep the order. Everything else (indexing by a tensor, sorting) is
    unknown, which costs speed only. What is known of a tensor ends when it, or a view of it, is written to.

    Args:
        rows: Rows of the micro-batch, which three-dimensional tensors have first; or its tokens, where it is packed:
            these have tokens second then, after a single row.
        packed: Which of the two.
    """

    def __init__(self, rows: int, packed: bool = False) -> None:
        super().__init__()
        self.rows, self.packed = rows, packed
        self._rests = False

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Within it nothing is followed."""
        self._rests = True
        try:
            yield
        finally:
            self._rests = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if self._rests:
            return results
        name = getattr(func, "__name__", "")
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor) and result.ndim == 2 and self._keeps(name, args, kwargs or {}, result):
                self.mark(result)
        return results

    def mark(self, tensor: torch.Tensor) -> None:
        """Take the tensor for one in order."""
        tensor.__dict__["_row_order"] = (self, tensor._version)  # views of one storage share the version

    def known(self, tensor: torch.Tensor, ago: int = 0) -> bool:
        """Whether [N, d] is known to hold N / rows vectors of one row after the other, or was so many writes ago."""
        return bool(tensor.__dict__.get("_row_order") == (self, tensor._version - ago))

    def _keeps(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> bool:
        given = [a for arg in args for a in (arg if isinstance(arg, (tuple, list)) else (arg,))]
        source = given[PRODUCTS.get(name, 0)] if len(given) > PRODUCTS.get(name, 0) else None
        if not isinstance(source, torch.Tensor) or len(result) % self.rows:
            return False
        if name == "__getitem__" and not _keeps_first_axis(args[1]):
            return False
        if source.ndim > 2:
            if self.packed:
                return source.shape[:2] == (1, self.rows) and name in RESHAPES
            pooled = name in POOLS and len(result) == self.rows
            return len(source) == self.rows and (pooled or name in RESHAPES)
        same = source.ndim == 2 and len(source) == len(result)
        if name in PRODUCTS or name in RESHAPES:
            return same and self.known(source)
        if name.strip("_") not in POINTWISE and name not in POINTWISE:
            return False
        given += kwargs.values()
        met = [a for a in given if isinstance(a, torch.Tensor) and a.ndim > 1 and len(a) > 1]
        # An operation in place has its own result among its arguments, one version on.
        on = int(name.endswith("_") and not name.endswith("__"))
        return bool(met) and all(len(a) == len(result) and self.known(a, on if a is result else 0) for a in met)


def _keeps_first_axis(index: Any) -> bool:
    """Whether x[index] keeps x's first axis as it is."""
    first, *others = index if isinstance(index, tuple) else (index,)
    whole = first is ... or (isinstance(first, slice) and first == slice(None))
    return whole and all(isinstance(i, (int, slice)) or i is ... for i in others)
