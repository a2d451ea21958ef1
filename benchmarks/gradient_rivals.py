"""A rival of the clipped sum: Opacus."""

import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from fedsim.gradients.objective import Batch
from fedsim.rows import IGNORED_LABEL

OPACUS = "opacus==1.6.0"


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast where a dtype is given."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@dataclass(frozen=True, kw_only=True)
class UnitBatch:
    """Rows of whole units, padded on the right.

    Attributes:
        batch: The rows.
        units: int64 [rows], which of the batch's units each belongs to, ascending from 0.
    """

    batch: Batch
    units: torch.Tensor


def find_opacus(install: bool) -> bool:
    """Whether Opacus can be imported, also from a folder of its own; installed there on request."""
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

    def __call__(self, batches: list[UnitBatch], clip_norm: float, autocast: torch.dtype | None) -> list[torch.Tensor]:
        """The clipped sum over the batches' units, by parameter."""
        for total in self.totals:
            total.zero_()
        try:
            for part in batches:
                rows = torch.bincount(part.units)
                losses = self._losses(part.batch, autocast) / rows[part.units]
                if self.mode == "ghost":
                    self._ghost(losses, clip_norm)
                else:
                    self._per_sample(losses, part.units, rows, clip_norm)
        finally:
            for parameter in self.parameters:
                parameter.grad_sample = parameter.grad = None
        return self.totals

    def _losses(self, batch: Batch, autocast: torch.dtype | None) -> torch.Tensor:
        ids = batch.input_ids
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)  # Opacus wants them
        with autocasting(ids.device, autocast):
            logits = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1]
        losses = cross_entropy(
            logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        )
        return losses.view(batch.labels.shape).sum(1) / (batch.labels != IGNORED_LABEL).sum(1)

    def _per_sample(self, losses: torch.Tensor, units: torch.Tensor, rows: torch.Tensor, clip_norm: float) -> None:
        losses.sum().backward()
        gradients = [_by_unit(p.grad_sample, units, rows) for p in self.parameters]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        factors = (clip_norm / norms).clamp(max=1)
        for total, gradient, parameter in zip(self.totals, gradients, self.parameters, strict=True):
            total += torch.einsum("u,u...->...", factors, gradient)
            parameter.grad_sample = parameter.grad = None

    def _ghost(self, losses: torch.Tensor, clip_norm: float) -> None:
        self.model.max_grad_norm = clip_norm
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


def _by_unit(gradients: torch.Tensor, units: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows' gradients [rows, …] added up by unit."""
    if len(rows) == len(gradients):
        return gradients
    return gradients.new_zeros(len(rows), *gradients.shape[1:]).index_add_(0, units, gradients)
