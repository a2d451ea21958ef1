"""Whether a model's packed rows see each other: tried on a micro-batch as full as any that will be."""

import numpy as np
import torch

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
VARIANTS = 4
"""How often other rows are exchanged: every second one, the others, and twice some at random and the rest."""


def leak_of(
    model: torch.nn.Module,
    head: torch.nn.Linear | None,
    rows: TokenRows,
    tokens: int,
    autocast: torch.dtype | None,
) -> str:
    """How a row's outputs depend on its neighbours in a packed pass, in words; empty if they do not.

    With the rows' lengths and places as they are, the tokens of some rows are replaced by others. Everything that is
    computed for the rest has the same shapes and the same operands, so it must be the same bit by bit, at every
    position: no tolerance lets a small leak through, be it of a state that decays, of a convolution over the last few
    tokens or of one attention head. A row's first tokens are next to its neighbour's last. Every row is once left as
    it is while both its neighbours change. That says nothing of how far a row begins from the start, which the lengths
    of others decide: so the rows are laid in the opposite order, too, and must give the same up to rounding.

    The micro-batch is as long as those to come, so that what crosses from one block of many tokens to the next is
    reached, too.

    Args:
        model: The model.
        head: What `plain_head` returned for it.
        rows: The caller's, of which the trial's are copies and cuts.
        tokens: Of a micro-batch at most.
        autocast: As of `clipped_sum`.
    """
    if tokens < LEAST_TOKENS:
        return f"of micro-batches of {tokens} tokens little can be seen"
    trial = _Trial(model, head, rows, tokens, autocast)
    base = trial.outputs(trial.rows)
    if not bool(torch.isfinite(base).all()):
        return "outputs are not finite"
    generator = np.random.default_rng(0)
    chosen = np.arange(len(trial.rows)) % 2 == 0
    for variant in range(VARIANTS):
        if variant == 2:
            chosen = generator.random(len(chosen)) < 0.5
        changed = trial.outputs(trial.exchanged(chosen, generator))
        kept = on_device(np.repeat(~chosen, trial.rows.lengths), base.device)
        if not torch.equal(changed[kept], base[kept]):
            return "a row sees what other rows say"
        if chosen.any() and bool((changed[~kept] == base[~kept]).all()):
            return "outputs do not depend on tokens"
        chosen = ~chosen
    backwards = np.arange(len(trial.rows))[::-1]
    turned = torch.split(trial.outputs(trial.rows.take(backwards)), trial.rows.lengths[backwards].tolist())
    limit = 5e-2 if keeps_half(model, autocast) else 1e-3
    for one, other in zip(torch.split(base, trial.rows.lengths.tolist()), reversed(turned), strict=True):
        if not float((one.double() - other).norm()) <= limit * float(one.double().norm()):
            return "a row depends on how many tokens come before it"
    return ""


class _Trial:
    """Rows that fill a micro-batch, and a model's outputs for them."""

    def __init__(
        self,
        model: torch.nn.Module,
        head: torch.nn.Linear | None,
        rows: TokenRows,
        tokens: int,
        autocast: torch.dtype | None,
    ) -> None:
        self.model, self.head, self.autocast = model, head, autocast
        self.device, self.attention = model_device(model), attention_configs(model)
        table = model.get_input_embeddings()  # type: ignore[operator]
        self.words = len(table.weight)
        most = max(2, tokens // LEAST_ROWS)
        lengths = np.minimum(rows.lengths, most)
        usable = np.flatnonzero(lengths)
        order = np.random.default_rng(0).permutation(usable)
        order = np.tile(order, -(-tokens // int(lengths[usable].sum())))
        order = order[: max(2, int(np.searchsorted(np.cumsum(lengths[order]), tokens, side="right")))]
        whole = rows.take(order)
        kept = np.arange(len(whole.tokens)) - np.repeat(whole.offsets[:-1], whole.lengths) < most
        offsets = np.concatenate([[0], np.cumsum(lengths[order])]).astype(np.int64)
        self.rows = TokenRows(tokens=whole.tokens[kept], offsets=offsets)

    def exchanged(self, chosen: np.ndarray, generator: np.random.Generator) -> TokenRows:
        """The rows with other tokens in the chosen ones, each unlike the one that was there."""
        here = np.repeat(chosen, self.rows.lengths)
        other = self.rows.tokens.copy()
        other[here] = (other[here] + generator.integers(1, max(2, self.words), here.sum())) % self.words
        return TokenRows(tokens=other, offsets=self.rows.offsets)

    @torch.no_grad()
    def outputs(self, rows: TokenRows) -> torch.Tensor:
        """What the head is given, or the logits, of every token: [N, d]."""
        batch, packed = packed_batch(rows, np.arange(len(rows)), self.device)
        with packed_attention(self.attention, packed), autocasting(self.device, self.autocast):
            found = (
                causal_logits(self.model, batch) if self.head is None else hidden_states(self.model, self.head, batch)
            )
        return found[0, : int(rows.offsets[-1])]
