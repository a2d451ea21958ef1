"""Other ways to do the gradient benchmark's step: without privacy, by a loop over users, and Opacus."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

OPACUS = "opacus==1.6.0"


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast where a dtype is given."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def micro_batches(tokens: torch.Tensor, rows: int, lengths: np.ndarray) -> Iterator[torch.Tensor]:
    """`rows` rows at a time, each micro-batch cut to its longest."""
    for start in range(0, len(tokens), rows):
        yield tokens[start : start + rows, : int(lengths[start : start + rows].max())]


def plain_step(
    model: torch.nn.Module, tokens: torch.Tensor, rows: int, autocast: torch.dtype | None, lengths: np.ndarray
) -> None:
    """An ordinary step: Hugging Face's own loss, gradients accumulated over micro-batches of `rows` rows."""
    for batch in micro_batches(tokens, rows, lengths):
        with autocasting(tokens.device, autocast):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss * (len(batch) / len(tokens))
        loss.backward()
    model.zero_grad()


def fused_step(
    model: torch.nn.Module, tokens: torch.Tensor, rows: int, autocast: torch.dtype | None, lengths: np.ndarray
) -> None:
    """The same with the chunked loss that the fast path uses."""
    from fedsim.gradients.head import fused_loss, plain_head
    from fedsim.gradients.objective import Batch

    head = plain_head(model)
    assert head is not None
    for ids in micro_batches(tokens, rows, lengths):
        batch = Batch(input_ids=ids, attention_mask=None, labels=ids[:, 1:])
        coefficients = torch.full((len(ids),), 1 / (len(tokens) * (tokens.shape[1] - 1)), device=ids.device)
        with autocasting(tokens.device, autocast):
            loss, _ = fused_loss(model, head, batch, coefficients)
        loss.backward()
    model.zero_grad()


def find_opacus(install: bool) -> bool:
    """Whether Opacus can be imported, from a folder of its own; installed there on request."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "fedsim" / "benchmarks" / OPACUS.replace("==", "-")
    if install and not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        if subprocess.run([*command, OPACUS, "opt_einsum"], check=False).returncode:
            return False
    if folder.exists() and str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        import opacus  # noqa: F401
    except ImportError:
        return False
    return True


class OpacusStep:
    """Opacus on a model of the same shape, its Conv1D layers replaced by Linear.

    mode "per-sample": gradients of every row, summed by user, clipped by user. mode "ghost": two backward passes and
    norms of rows, the tie of input and output embeddings cut; it knows no users, so with several rows a user it clips
    rows and is timed only.
    """

    def __init__(self, model: torch.nn.Module, mode: str) -> None:
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

        self.mode = mode
        if mode == "ghost":  # refuses tied weights: the output layer gets its own
            head = model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        wrap = GradSampleModule if mode == "per-sample" else GradSampleModuleFastGradientClipping
        self.model = wrap(model.train(), loss_reduction="sum")  # its hooks want training mode; dropout is 0
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.totals = [torch.zeros_like(p) for p in self.parameters]

    def __call__(
        self, tokens: torch.Tensor, rows: int, rows_per_user: int, autocast: torch.dtype | None, clip_norm: float = 1.0
    ) -> None:
        """A clipped sum over tokens [R, T] in micro-batches of `rows` rows, a multiple of rows_per_user."""
        for total in self.totals:
            total.zero_()
        for start in range(0, len(tokens), rows):
            losses = self._losses(tokens[start : start + rows], autocast) / rows_per_user
            if self.mode == "ghost":
                self._ghost(losses)
            else:
                self._per_sample(losses, rows_per_user, clip_norm)

    def _losses(self, batch: torch.Tensor, autocast: torch.dtype | None) -> torch.Tensor:
        positions = torch.arange(batch.shape[1], device=batch.device).repeat(len(batch), 1)  # Opacus wants them
        with autocasting(batch.device, autocast):
            logits = self.model(input_ids=batch, position_ids=positions, use_cache=False).logits[:, :-1]
        losses = cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
        return losses.view(len(batch), -1).mean(1)

    def _per_sample(self, losses: torch.Tensor, rows_per_user: int, clip_norm: float) -> None:
        losses.sum().backward()
        gradients = [p.grad_sample.unflatten(0, (-1, rows_per_user)).sum(1) for p in self.parameters]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        factors = (clip_norm / norms).clamp(max=1)
        for total, gradient, parameter in zip(self.totals, gradients, self.parameters, strict=True):
            total += torch.einsum("u,u...->...", factors, gradient)
            parameter.grad_sample = parameter.grad = None

    def _ghost(self, losses: torch.Tensor) -> None:
        losses.sum().backward(retain_graph=True)
        for parameter in self.parameters:
            parameter.grad = None
        factors = self.model.get_clipping_coef()
        self.model.disable_hooks()
        (factors * losses).sum().backward()
        self.model.enable_hooks()
        for total, parameter in zip(self.totals, self.parameters, strict=True):
            total += parameter.grad
            parameter.grad = None
