"""Which parts of a model are sharded by themselves: its blocks, one after the other, and the rest around them."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch.distributed.fsdp import FSDPModule

from fedsim.errors import Failure, InvalidInput
from fedsim.gradients.objective import Objective, random_rows

ALONE = "Leave --engine.devices-per-worker at 1 for it."
RECOVERY = "reset_iter_state"
"""The method by which PyTorch, from 2.13 on, puts a sharded model back."""
TRIED_TOKENS = 4
"""Tokens of the row that tells how often blocks are called."""


def blocks_of(model: torch.nn.Module, objective: Objective) -> list[torch.nn.Module]:
    """The members of a model's outermost lists of modules, each of which is called once in a pass.

    Parameters of one are gathered when it is called and given up when it is left, so that a device holds those of one
    block beside its shards; everything outside of blocks (embeddings, the last layer) is gathered for a whole pass.

    Args:
        model: Whole, as it was loaded.
        objective: Tells how a row passes through it.

    Raises:
        InvalidInput: The installed PyTorch is older than 2.13; the model has no such lists; parameters are shared
            between blocks, or are no floating-point numbers of at least one axis; or a block is not called once in a
            pass.
    """
    _require_recovery()
    kind = type(model).__name__
    _require_plain_parameters(model)
    blocks = list(_members(model))
    if not blocks:
        raise InvalidInput("model", kind, "a model whose blocks are in a list of modules, to be sharded", ALONE)
    owners: dict[int, set[int]] = {}
    for number, block in enumerate(blocks):
        for parameter in block.parameters():
            owners.setdefault(id(parameter), set()).add(number)
    within = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in within:
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), set()).add(-1)
    if any(len(numbers) > 1 for numbers in owners.values()) or len(set(map(id, blocks))) < len(blocks):
        raise InvalidInput("model", kind, "a model whose blocks share no parameters, to be sharded", ALONE)
    _require_called_once(model, blocks, objective)
    return blocks


def _require_recovery() -> None:
    """Refuse a PyTorch that cannot put a sharded model back after a pass that was broken off."""
    if not hasattr(FSDPModule, RECOVERY):
        allowed = "2.13 or newer for a worker of several devices, to go on after a pass that was broken off"
        raise InvalidInput(
            "torch", torch.__version__, allowed, "Upgrade it, or leave --engine.devices-per-worker at 1."
        )


def _members(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for child in module.children():
        if isinstance(module, torch.nn.ModuleList) and not isinstance(child, torch.nn.ModuleList):
            if any(True for _ in child.parameters()):
                yield child
        else:
            yield from _members(child)


def _require_plain_parameters(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or getattr(parameter, "quant_state", None) is not None:
            raise InvalidInput(
                "model", f"{name} of {parameter.dtype}", "without quantised weights, to be sharded", ALONE
            )
        if parameter.ndim == 0:
            raise InvalidInput("model", f"{name}, a single number", "without such parameters, to be sharded", ALONE)


def _require_called_once(model: torch.nn.Module, blocks: list[torch.nn.Module], objective: Objective) -> None:
    calls: Counter[int] = Counter()
    handles = [block.register_forward_pre_hook(lambda module, _: calls.update([id(module)])) for block in blocks]
    device = next(model.parameters()).device
    rows = random_rows(objective, 1, TRIED_TOKENS, 2)
    try:
        with torch.no_grad():
            objective.row_losses(model, objective.collate(rows, rows.offsets[:1], device))
    except (InvalidInput, Failure, MemoryError):
        raise
    except Exception as error:
        told = f"{type(model).__name__} failed on a row of {TRIED_TOKENS} tokens: {str(error) or type(error).__name__}"
        raise Failure(told) from error
    finally:
        for handle in handles:
            handle.remove()
    odd = [calls[id(block)] for block in blocks if calls[id(block)] != 1]
    if odd:
        kind = f"{type(model).__name__}, of which a block is called {odd[0]} times in a pass"
        raise InvalidInput("model", kind, "a model whose blocks are called once each, to be sharded", ALONE)
