"""A model of which each process of a group holds a shard of every parameter (PyTorch's FSDP2)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from fedsim.errors import Failure, InvalidInput
from fedsim.gradients.head import plain_head
from fedsim.gradients.layers import layer_kinds, rule_for, trained_layers
from fedsim.gradients.model import ParameterLayout, accumulation_dtype, trainable_parameters
from fedsim.gradients.objective import CausalLanguageModel, Objective
from fedsim.gradients.rules.adapters import own_parameters
from fedsim.gradients.sharded.blocks import RECOVERY, blocks_of
from fedsim.gradients.sharded.total import Bucket
from fedsim.gradients.tape import Forms, Record

Taker = Callable[[str, torch.Tensor], None]


class ShardedModel:
    """A model sharded over torch's default process group, and what was known of it while it was whole.

    All processes of the group make one of the same model, and from then on do with it the same things in the same
    order: each pass gathers every block's parameters from all of them.

    While a block is gathered its modules hold other parameters than in between. These stay the same objects, whose
    memory comes and goes; they are what a pass knows parameters by.

    Args:
        model: Whole, in evaluation mode. It is sharded in place.
        objective: What is minimised.
        device: Where this process computes; the parameters' shards are moved there.

    Attributes:
        model, objective, device: As given.
        rank, ranks: This process's place in the group, and how many there are.
        layout: The trainable parameters, whole.
        dtype: In what sums are added up.
        parameters: The trainable parameters as blocks hold them while they are gathered, by name.
        layers: Layers with trainable parameters, but for `head`, with names and rules.
        owned: Each layer's own parameters, as in `parameters`.
        head: The last layer, where it can be computed together with the loss.
        kinds: Of layers, by name.
        buckets: Neighbouring parameters of one block, whose sums are formed and handed on together.
        verdicts: What trials found, by what was asked (`sharded.trial`).

    Raises:
        InvalidInput: The model cannot be sharded (`blocks_of`), or has nothing to train.
    """

    def __init__(self, model: torch.nn.Module, objective: Objective, device: torch.device) -> None:
        self.objective, self.device = objective, device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.layout = ParameterLayout.of(model)
        self.dtype = accumulation_dtype(trainable_parameters(model).values())
        blocks = blocks_of(model, objective)
        # All that is found out by trying is found out while the model is whole.
        self.head = plain_head(model) if type(objective) is CausalLanguageModel else None
        self.kinds = layer_kinds(model, self.head)
        trained = trained_layers(model)
        self.layers: dict[torch.nn.Module, tuple[str, Record]] = {
            module: (name, rule_for(module)[1]) for name, module in trained if module is not self.head
        }
        names = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
        own = {module: [names[id(p)] for p in own_parameters(module) if id(p) in names] for _, module in trained}
        self.model = _sharded(model, blocks, device)
        self.parameters, owners = self._gathered_parameters(blocks)
        self.owned = {module: [self.parameters[name] for name in found] for module, found in own.items()}
        self.buckets = Bucket.of(self.layout, owners)
        self.verdicts: dict[object, tuple[int, str, Forms]] = {}
        self._taker: Taker | None = None
        self._broken = ""
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(self._handing_over(name))  # type: ignore[no-untyped-call]

    def _gathered_parameters(self, blocks: list[torch.nn.Module]) -> tuple[dict[str, torch.nn.Parameter], list[int]]:
        """The trainable parameters as they are while gathered, and which module each belongs to."""
        found: dict[str, tuple[torch.nn.Parameter, int]] = {}
        for number, module in enumerate([*blocks, self.model]):
            assert isinstance(module, FSDPModule)
            module.unshard()
            for name, parameter in self.model.named_parameters():
                if not isinstance(parameter, DTensor):
                    found[name] = parameter, number
            module.reshard()
        parameters = {name: found[name][0] for name in self.layout.names}
        return parameters, [found[name][1] for name in self.layout.names]

    def _handing_over(self, name: str) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None  # else the group would add it up, whosever it is
            if self._taker is not None and gradient is not None:
                self._taker(name, gradient)

        return hook

    @contextmanager
    def giving(self, taker: Taker | None) -> Iterator[None]:
        """Within it what autograd finds of each parameter's gradient goes to the taker, by name, as it is found."""
        self._taker = taker
        try:
            yield
        finally:
            self._taker = None

    @contextmanager
    def gathered(self) -> Iterator[torch.nn.Module]:
        """Within it what lies outside of blocks is whole, so that passes gather blocks alone.

        Raises:
            Failure: An earlier pass was broken off, and PyTorch did not put the model back.
        """
        if self._broken:
            raise Failure(self._broken)
        assert isinstance(self.model, FSDPModule)
        self.model.unshard()
        try:
            yield self.model
        except BaseException as reason:
            self._put_back_after(reason)
            raise
        self.model.reshard()

    def _put_back_after(self, reason: BaseException) -> None:
        """Put everything back after a pass that was broken off, as far as that is in this process's hands.

        What broke it off is what is told, whatever comes of this; the model computes nothing more if nothing does.
        """
        assert isinstance(self.model, FSDPModule)
        try:
            getattr(self.model, RECOVERY)()
            self.model.reshard()
        except Exception as error:
            self._broken = f"PyTorch did not put the model back after {type(reason).__name__}: {error}"
            reason.add_note(self._broken)

    def load(self, flat: np.ndarray | torch.Tensor) -> None:
        """Write this process's part of flat [P] into its shards, in their own dtype.

        Raises:
            InvalidInput: flat has another size than the layout.
        """
        if flat.ndim != 1 or len(flat) != self.layout.size:
            raise InvalidInput("flat", tuple(flat.shape), f"a vector of {self.layout.size} values")
        named = dict(self.model.named_parameters())
        layout = self.layout
        with torch.no_grad():
            for name, shape, start, stop in zip(
                layout.names, layout.shapes, layout.offsets[:-1], layout.offsets[1:], strict=True
            ):
                piece = flat[start:stop] if isinstance(flat, torch.Tensor) else torch.from_numpy(flat[start:stop])
                parts = torch.chunk(piece.view(shape), self.ranks, 0)
                if self.rank < len(parts):
                    local = named[name]
                    assert isinstance(local, DTensor)
                    local.to_local().copy_(parts[self.rank])

    def most(self, value: int) -> int:
        """The largest of the numbers that the processes of the group have."""
        return self._agreed(value, dist.ReduceOp.MAX)

    def least(self, value: int) -> int:
        """The smallest of them."""
        return self._agreed(value, dist.ReduceOp.MIN)

    def _agreed(self, value: int, how: dist.ReduceOp.RedOpType) -> int:
        number = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(number, how)
        return int(number)


def _sharded(model: torch.nn.Module, blocks: list[torch.nn.Module], device: torch.device) -> torch.nn.Module:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    root = fully_shard(model, mesh=mesh)
    # The last layer may be asked for more after the backward pass (`per_unit.formed_again`).
    root.set_reshard_after_backward(False, recurse=False)
    return model
