"""How many bytes of tensors are alive at once, counted as each operation makes them."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Within it, counts the storage that operations make, until it is let go.

    What a process takes of the system tells nothing of models that are smaller than the library; this tells what a
    large one of the same shape would take, up to workspaces within an operation.

    Attributes:
        peak: Most bytes alive at once beyond those before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(s) for s in _storages((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for storage in _storages(found):
            if id(storage) not in before and id(storage) not in self._known:
                self._count(storage)
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = id(storage), storage.nbytes()

        def let_go(_: object) -> None:
            self.alive -= size
            self._known.pop(place, None)

        self._known[place] = weakref.ref(storage, let_go)
        self.alive += size
        self.peak = max(self.peak, self.alive)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
