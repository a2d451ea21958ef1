"""What the processes of a group are told in tests of sharded sums: models by name, and sums of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedsim.clip import Clip
from fedsim.engine.exact import quantiser
from fedsim.gradients import CausalLanguageModel, Objective, head, random_rows
from fedsim.gradients.per_unit.formed_again import FormedAgain
from fedsim.gradients.sharded import total as sharded_total
from fedsim.gradients.sharded.model import ShardedModel
from fedsim.gradients.sharded.sums import sharded_sum
from fedsim.rows import TokenRows
from tests.gradients.gradient_checks import VOCABULARY, architectures

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
MODELS = (
    "gpt2, tied",
    "gpt2, untied",
    "llama",
    "llama, tied",
    "qwen3",
    "bert classifier",
    "checkpointed",
    "lora",
    "t5",
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What came of a sum, whole."""

    total: torch.Tensor
    norms: torch.Tensor
    losses: torch.Tensor
    finite: torch.Tensor


def made(name: str) -> tuple[torch.nn.Module, Objective]:
    """A small model, the same in every process."""
    torch.manual_seed(0)
    if name == "lora":
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        base = LlamaForCausalLM(LlamaConfig(**LLAMA)).bfloat16()
        model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = torch.randn(parameter.shape) / 4
        return model.eval(), CausalLanguageModel()
    if name in ("checkpointed", "deep"):
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(**LLAMA | {"num_hidden_layers": 16 if name == "deep" else 2}))
        if name == "deep":
            return model.eval(), CausalLanguageModel()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train(), CausalLanguageModel()
    if name == "t5":
        from transformers import T5Config, T5ForConditionalGeneration

        from fedsim.gradients import SequenceToSequence

        shape = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
        config = T5Config(**shape, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
        return T5ForConditionalGeneration(config).eval(), SequenceToSequence(start=0)
    for key, model, objective in architectures():
        if key == name:
            return model.eval(), objective
    raise KeyError(name)


_sharded: dict[str, ShardedModel] = {}


def sharded(name: str) -> ShardedModel:
    """The model of this process, sharded once."""
    if name not in _sharded:
        model, objective = made(name)
        _sharded[name] = ShardedModel(model, objective, torch.device("cpu"))
    return _sharded[name]


def summed(
    rank: int, name: str, rows: TokenRows, ids: np.ndarray, clip: Clip, resolution: float = 0.0, **options: Any
) -> tuple[torch.Tensor, Found]:
    """This process's part of a sum, at its places of a vector of zeros, and the rest of what it was told."""
    on_grid = partial(_steps, clip=clip, resolution=resolution) if resolution else None
    found = sharded_sum(sharded(name), rows, ids, clip, on_grid=on_grid, **options)
    own = torch.zeros(sharded(name).layout.size, dtype=found.total.parts[0].dtype)
    found.total.write_to(own)
    return own, Found(total=own, norms=found.norms, losses=found.losses, finite=found.finite)


def _steps(update, clip, resolution):
    return quantiser(update, clip, resolution)


def loaded(rank: int, name: str, flat: torch.Tensor) -> None:
    """Give the model these parameters."""
    sharded(name).load(flat)


def largest_tensor(rank: int, rows: TokenRows, ids: np.ndarray, clip: Clip, max_tokens: int) -> tuple[int, int]:
    """Values of the largest tensor that is made while a sum of a deep model is formed, and of this process's part."""
    model = sharded("deep")
    summed(rank, "deep", rows, ids, clip, max_tokens=max_tokens)  # with the trial, which holds gradients on the host
    with _Largest() as seen:
        found = sharded_sum(model, rows, ids, clip, max_tokens=max_tokens)
    return seen.most, sum(map(len, found.total.parts))


class _Largest(TorchDispatchMode):
    """Sees every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.numel())
        return found


def amiss(rank: int, how: str, *args: Any) -> tuple[torch.Tensor, Found]:
    """`summed`, with a sum that is not what it should be."""
    right = sharded_total._reduce_scatter

    def wrong(received: torch.Tensor, whole: torch.Tensor) -> None:
        right(received, torch.zeros_like(whole) if how == "a process left out" and rank == 1 else whole)
        if how == "divided by their number":  # as gradients of data-parallel training are
            received /= 2

    sharded_total._reduce_scatter = wrong
    try:
        return summed(rank, *args)
    finally:
        sharded_total._reduce_scatter = right


def formed_again(rank: int, *args: Any, **options: Any) -> tuple[torch.Tensor, Found]:
    """`summed`, with a last layer whose logits' gradient is never kept, but formed once more for the sum."""
    kept, head.KEPT_ELEMENTS = head.KEPT_ELEMENTS, {"cpu": 0, "cuda": 0}
    formed: list[int] = []
    add, FormedAgain.add_weighted = FormedAgain.add_weighted, _noting(FormedAgain.add_weighted, formed)
    try:
        found = summed(rank, *args, **options)
    finally:
        head.KEPT_ELEMENTS, FormedAgain.add_weighted = kept, add
    assert formed, "nothing was formed again"
    return found


def _noting(function, calls):
    def noting(*args):
        calls.append(1)
        return function(*args)

    return noting


def dying(rank: int, which: int, how: str, name: str, *args: Any) -> tuple[torch.Tensor, Found]:
    """`summed`, in which one process ends in a block of its first pass, or in the midst of adding up."""
    if rank == which and how == "in a pass":
        sharded(name).model.model.layers[1].register_forward_pre_hook(lambda *_: os._exit(7))
    if rank == which and how == "in a reduction":
        sharded(name)
        sharded_total._reduce_scatter = lambda *_: os._exit(7)
    return summed(rank, name, *args)


def broken_off(rank: int, name: str, how: str) -> tuple[str, str]:
    """What a pass that fails raises, and the one after it, where PyTorch does not put the model back."""
    model, objective = made(name)
    one = ShardedModel(model, objective, torch.device("cpu"))
    rows = random_rows(objective, 1, 4, VOCABULARY)
    with one.gathered() as whole, torch.no_grad():
        objective.row_losses(whole, objective.collate(rows, rows.offsets[:1], one.device))
    reset = FSDPModule.reset_iter_state

    def failing(module: FSDPModule) -> None:
        raise RuntimeError("cannot be put back")

    told = []
    try:
        if how == "absent":
            del FSDPModule.reset_iter_state
        elif how == "failing":
            FSDPModule.reset_iter_state = failing
        for reason in ("no memory is left", "another"):
            try:
                with one.gathered():
                    raise torch.OutOfMemoryError(reason)
            except Exception as error:
                told.append(f"{type(error).__name__}: {error}")
    finally:
        FSDPModule.reset_iter_state = reset
    return told[0], told[1]
