"""Whether a model's packed rows see each other: tried on a micro-batch as full as any that will be."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from fedsim.gradients.fast import frozen
from fedsim.gradients.head import hidden_states
from fedsim.gradients.model import autocasting, keeps_half, model_device, on_device
from fedsim.gradients.objective import causal_logits
from fedsim.gradients.rows.attention import attention_configs, packed_attention
from fedsim.gradients.rows.packed import packed_batch
from fedsim.rows import TokenRows

LEAST_ROWS = 4
"""Rows are cut so that so many fit."""
LEAST_TOKENS = 16
"""Fewer are not worth packing."""
NOT_FINITE = "outputs are not finite"
"""What is said where nothing can be compared."""


class LeakTrial:
    """Rows that fill a micro-batch, and what a model makes of them: do they see each other?

    With the rows' lengths and places as they are, the tokens of some rows are replaced by others. Everything that is
    computed for the rest has the same shapes and the same operands, so it must be the same bit by bit, at every
    position: no tolerance lets a small leak through, be it of a state that decays, of a convolution over the last few
    tokens or of one attention head. That is asked of the model's outputs, of what each trainable layer is given, which
    may reach no output yet where a layer is zero at first, and of each one's output gradient. A row's first tokens are
    next to its neighbour's last. Of any two rows each is once left as it is while the other changes. That says nothing
    of how far a row begins from the start, which the lengths of others decide: so the rows are laid in the opposite
    order, too, and must give the same up to rounding.

    The micro-batch has as many tokens as those to come, so that what crosses from one block of many tokens to the next
    is reached, too.

    Args:
        model: The model.
        head: What `plain_head` returned for it.
        layers: Those with trainable parameters.
        rows: The caller's, of which the trial's are copies and cuts.
        tokens: Of a micro-batch at most.
        autocast: As of `clipped_sum`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        head: torch.nn.Linear | None,
        layers: Sequence[torch.nn.Module],
        rows: TokenRows,
        tokens: int,
        autocast: torch.dtype | None,
    ) -> None:
        self.model, self.head, self.layers, self.autocast = model, head, layers, autocast
        self.device, self.attention = model_device(model), attention_configs(model)
        self.table = model.get_input_embeddings()  # type: ignore[operator]
        self.words = len(self.table.weight)
        self.rows = _filling(rows, tokens)

    def leak(self) -> str:
        """How a row depends on its neighbours in a packed pass, in words; empty if it does not."""
        base, digests = self.outputs(self.rows)
        if not bool(torch.isfinite(base).all()):
            return NOT_FINITE
        generator, places = np.random.default_rng(0), np.arange(len(self.rows))
        for bit in range(max(1, (len(places) - 1).bit_length())):
            for chosen in ((places >> bit) % 2 == 0, (places >> bit) % 2 == 1):
                changed, others = self.outputs(self.exchanged(chosen, generator))
                kept = on_device(np.repeat(~chosen, self.rows.lengths), base.device)
                if len(others) != len(digests) or not _same(others, digests, kept):
                    return "a row sees what other rows say"
                if chosen.any() and bool((changed[~kept] == base[~kept]).all()):
                    return "outputs do not depend on tokens"
        backwards = places[::-1]
        turned = torch.split(self.outputs(self.rows.take(backwards))[0], self.rows.lengths[backwards].tolist())
        limit = 5e-2 if keeps_half(self.model, self.autocast) else 1e-3
        for one, other in zip(torch.split(base, self.rows.lengths.tolist()), reversed(turned), strict=True):
            if not float((one.double() - other).norm()) <= limit * float(one.double().norm()):
                return "a row depends on how many tokens come before it"
        return ""

    def exchanged(self, chosen: np.ndarray, generator: np.random.Generator) -> TokenRows:
        """The rows with other tokens in the chosen ones, each unlike the one that was there."""
        here = np.repeat(chosen, self.rows.lengths)
        other = self.rows.tokens.copy()
        other[here] = (other[here] + generator.integers(1, max(2, self.words), here.sum())) % self.words
        return TokenRows(tokens=other, offsets=self.rows.offsets)

    def outputs(self, rows: TokenRows) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What the head is given, or the logits, of every token, [N, d]; and digests of all that a pass leaves."""
        batch, packed = packed_batch(rows, np.arange(len(rows)), self.device)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        digests: list[torch.Tensor] = []
        with frozen(parameters), packed_attention(self.attention, packed), self._digested(packed.tokens, digests):
            with autocasting(self.device, self.autocast):
                found = (
                    causal_logits(self.model, batch)
                    if self.head is None
                    else hidden_states(self.model, self.head, batch)
                )
            weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(0)).to(found)
            torch.autograd.backward((found * weights).sum())
        digests.append(_digest(found[0]))
        return found[0, : int(rows.offsets[-1])].detach(), digests

    @contextmanager
    def _digested(self, tokens: int, digests: list[torch.Tensor]) -> Iterator[None]:
        """Within it digests of the tokens of each layer's inputs, and of its output gradient, are noted."""

        def note(tensor: torch.Tensor) -> None:
            of_tokens = _by_token(tensor, tokens)
            if of_tokens is not None:
                digests.append(_digest(of_tokens))

        def hook(module: torch.nn.Module, args: Any, named: Any, output: Any) -> None:
            for given in tree_leaves((args, named)):
                if isinstance(given, torch.Tensor):
                    note(given)
            for returned in tree_leaves(output):
                if isinstance(returned, torch.Tensor) and returned.requires_grad:
                    returned.register_hook(note)  # type: ignore[no-untyped-call]

        handles = [self.table.register_forward_hook(lambda *call: call[-1].requires_grad_(True))]
        handles += [
            layer.register_forward_hook(hook, with_kwargs=True) for layer in self.layers if layer is not self.head
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _same(one: list[torch.Tensor], other: list[torch.Tensor], kept: torch.Tensor) -> bool:
    """Whether digests [N] agree on the tokens kept."""
    return bool((torch.stack(one)[:, : len(kept)] == torch.stack(other)[:, : len(kept)])[:, kept].all())


def _filling(rows: TokenRows, tokens: int) -> TokenRows:
    """Rows that fill a micro-batch: the longest, as far as half of it, among others, repeated and cut."""
    usable = np.flatnonzero(rows.lengths)
    order = np.random.default_rng(0).permutation(usable)
    first = int(usable[rows.lengths[usable].argmax()])
    room = tokens - min(int(rows.lengths[first]), tokens // 2)
    order = np.tile(order, -(-room // int(rows.lengths[usable].sum())))
    most = max(2, room // (LEAST_ROWS - 1))
    fitting = max(1, int(np.searchsorted(np.cumsum(np.minimum(rows.lengths[order], most)), room, side="right")))
    order = np.insert(order[:fitting], fitting // 2, first)
    lengths = np.minimum(rows.lengths[order], most)
    lengths[fitting // 2] = tokens - room
    whole = rows.take(order)
    kept = np.arange(len(whole.tokens)) < np.repeat(whole.offsets[:-1] + lengths, whole.lengths)
    return TokenRows(tokens=whole.tokens[kept], offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def _by_token(tensor: torch.Tensor, tokens: int) -> torch.Tensor | None:
    """A layer's tensor as [N, …]; None where it is not of floats, or not of one vector or several a token."""
    if not tensor.is_floating_point():
        return None
    axes = [axis for axis, size in enumerate(tensor.shape[:-1]) if size == tokens]
    return tensor.movedim(axes[0], 0) if len(axes) == 1 else None


def _digest(values: torch.Tensor) -> torch.Tensor:
    """A number of each token's bits, [N, …] → int64 [N], that differs where these differ."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    # Zeros of either sign are the same number.
    of_tokens = (values.detach() + 0.0).flatten(1).contiguous().view(bits).long()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (of_tokens.shape[1],), generator=generator) * 2 + 1
    return (of_tokens * weights.to(of_tokens.device)).sum(1)
