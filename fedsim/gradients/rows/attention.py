"""Attention of packed rows, each by itself: what Hugging Face's models are made to use within a packed pass."""

import copy
import functools
import inspect
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from fedsim.gradients.model import compute_dtype, wide_dtype
from fedsim.gradients.rows.packed import PackedRows

NAME = "fedsim_packed"
"""Under which Hugging Face's registries know this attention."""
SEEN = frozenset({"dropout", "scaling", "is_causal", "sliding_window", "softcap", "s_aux"})
"""Arguments of an attention that are heeded here."""
OF_NO_EFFECT = frozenset({
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict",
})  # fmt: skip
"""Arguments that change nothing where rows are whole: places in a row are in queries and keys by then."""

Configured = list[tuple[torch.nn.Module, Any]]
"""Modules, and for each a copy of its configuration that names this attention."""


@dataclass(frozen=True)
class _Pass:
    """A pass under way: its rows, and the masks that were made for it."""

    rows: PackedRows
    masks: list[torch.Tensor]


_passes: dict[int, _Pass] = {}
"""By the identity of a configuration that the model reads during the pass."""


class NotPackableError(RuntimeError):
    """A model asks its attention for something that is not done for packed rows."""


@contextmanager
def packed_attention(configured: Configured, rows: PackedRows) -> Iterator[None]:
    """Within it the attention of a model keeps the rows apart, in the forward and the backward pass.

    Only layers that look their attention up in Hugging Face's registry are reached: a trial must show what others do.
    The model's modules get other configurations meanwhile; the configuration itself, which other models may share,
    stays as it is.

    Args:
        configured: The model's `attention_configs`.
        rows: Those of the pass.
    """
    before = [vars(module)["config"] for module, _ in configured]
    pass_ = _Pass(rows, [])
    try:
        for module, config in configured:
            _passes[id(config)] = pass_
            vars(module)["config"] = config
        yield
    finally:
        for (module, config), own in zip(configured, before, strict=True):
            vars(module)["config"] = own
            _passes.pop(id(config), None)


def attention_configs(model: torch.nn.Module) -> Configured:
    """The model's modules that have a configuration naming an attention, each with a copy that names ours.

    Raises:
        NotPackableError: The model has none of such a kind.
    """
    library = sys.modules.get("transformers.modeling_utils")
    masks = sys.modules.get("transformers.masking_utils")
    copies: dict[int, Any] = {}
    found: Configured = []
    for module in model.modules():
        config = vars(module).get("config")
        if "_attn_implementation_internal" not in getattr(config, "__dict__", ()):
            continue
        if id(config) not in copies:
            copies[id(config)] = copy.copy(config)
            vars(copies[id(config)])["_attn_implementation_internal"] = NAME
        found.append((module, copies[id(config)]))
    if library is None or masks is None or not found:
        raise NotPackableError(f"{type(model).__name__} is no model of transformers")
    # That library is not imported here: a model that is of it has done so.
    library.AttentionInterface.register(NAME, attention)
    masks.AttentionMaskInterface.register(NAME, mask_of_rows)
    return found


def mask_of_rows(
    *, q_length: Any = None, kv_length: int, mask_function: Any, config: Any, **arguments: Any
) -> torch.Tensor | None:
    """Which of its tokens a token of a row sees, bool [1, 1, T, T] for the longest row; None where it is all before.

    Called by Hugging Face's models once for each kind of layer, in place of what would build [N, N].

    Raises:
        NotPackableError: What is seen depends on something else than places in a row.
    """
    rows = _passes[id(config)].rows
    extra = (arguments.get("q_offset"), arguments.get("kv_offset"), arguments.get("attention_mask"))
    of_tokens = arguments.get("use_vmap") or any(isinstance(x, torch.Tensor) or x for x in extra)
    if of_tokens or kv_length != rows.tokens:
        raise NotPackableError("a mask that is not a function of places alone")
    window = arguments.get("local_size")
    if window is None or rows.longest <= window:
        return None
    place = rows.start_of_longest + torch.arange(rows.longest, device=rows.device)
    zero = torch.zeros((), dtype=torch.long, device=rows.device)
    seen: torch.Tensor = mask_function(zero, zero, place[:, None], place[None, :])
    mask = seen.expand(rows.longest, rows.longest)[None, None]
    _passes[id(config)].masks.append(mask)
    return mask


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row, [1, heads, N, d] → [1, N, heads, d].

    Args:
        module: The layer that asks.
        query, key, value: [1, heads, N, d] of all rows; keys and values may have fewer heads.
        attention_mask: What `mask_of_rows` gave.
        **arguments: As Hugging Face's models pass them.

    Raises:
        NotPackableError: An argument that is not heeded here.
    """
    rows, masks = _passes[id(module.config)].rows, _passes[id(module.config)].masks
    unknown = {name for name, x in arguments.items() if name not in SEEN | OF_NO_EFFECT and x is not None}
    causal = arguments.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window = arguments.get("sliding_window")
    if unknown or arguments.get("dropout") or arguments.get("output_attentions") or not causal:
        asked = ", ".join(sorted(unknown)) or "dropout, weights, or no causality"
        raise NotPackableError(f"{type(module).__name__} asks its attention for {asked}")
    if attention_mask is not None and not any(attention_mask is mask for mask in masks):
        raise NotPackableError(f"{type(module).__name__} has a mask of its own")
    if attention_mask is None and window is not None and window < rows.longest:
        raise NotPackableError(f"{type(module).__name__} has a window that its mask does not show")
    if not query.shape[2] == key.shape[2] == value.shape[2] == rows.tokens or not len(query) == len(key) == 1:
        raise NotPackableError(f"{type(module).__name__} attends with {tuple(query.shape)} to {tuple(key.shape)}")
    scale = arguments.get("scaling")
    plain = attention_mask is None and arguments.get("softcap") is None and arguments.get("s_aux") is None
    packed = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]  # [N, heads, d]
    if plain and _by_varlen(packed):
        return _varlen(packed, rows.boundaries, rows.longest, scale)[None], None
    parts = []
    for q, k, v in zip(*(_unpacked(x, rows) for x in packed), strict=True):
        seen = None if attention_mask is None else attention_mask[:, :, : q.shape[2], : q.shape[2]]
        if arguments.get("softcap") is None and arguments.get("s_aux") is None:
            k, v = (_repeated_for_heads(x, q.shape[1]) for x in (k, v))
            part = scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale)
        else:
            part = _by_scores(q, k, v, seen, scale, arguments.get("softcap"), arguments.get("s_aux"))
        parts.append(part.transpose(1, 2).flatten(0, 1))
    if rows.uniform:
        return parts[0][None], None
    there, back = rows.places
    together = parts[0] if len(parts) == 1 else torch.cat(parts)
    return _gathered(together, back, None, len(there))[None], None


def _repeated_for_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values, whose heads are on axis 1, repeated for each head of the queries."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _unpacked(packed: torch.Tensor, rows: PackedRows) -> list[torch.Tensor]:
    """[N, heads, d] as [rows, heads, T, d] of each bucket."""
    if rows.uniform:
        return [packed.view(len(rows.lengths), -1, *packed.shape[1:]).transpose(1, 2)]
    there, back = rows.places
    padded = _gathered(packed, there, back, len(back))
    parts = torch.split(padded, [number * length for number, length in rows.buckets])
    return [
        part.view(number, length, *part.shape[1:]).transpose(1, 2)
        for part, (number, length) in zip(parts, rows.buckets, strict=True)
    ]


class _Gathered(torch.autograd.Function):
    """x[index], whose gradient is gathered too: what was copied to several places has one whose gradient counts."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, index: torch.Tensor, back: torch.Tensor | None, number: int
    ) -> torch.Tensor:
        ctx.save_for_backward(index, back)
        ctx.number = number
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        index, back = ctx.saved_tensors
        if back is not None:
            return gradient.index_select(0, back), None, None, None
        return gradient.new_zeros(ctx.number, *gradient.shape[1:]).index_copy_(0, index, gradient), None, None, None


def _gathered(x: torch.Tensor, index: torch.Tensor, back: torch.Tensor | None, number: int) -> torch.Tensor:
    gathered: torch.Tensor = _Gathered.apply(x, index, back, number)  # type: ignore[no-untyped-call]
    return gathered


def _by_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor | None,
    scale: float | None,
    cap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention whose scores are capped softly, or compete with a sink a head: [rows, heads, T, d]."""
    k, v = (_repeated_for_heads(x, q.shape[1]) for x in (k, v))
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if seen is None:
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    wide = wide_dtype(scores.dtype)
    scores = scores.to(wide).masked_fill(~seen, torch.finfo(wide).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    return torch.softmax(scores, -1)[..., : q.shape[2]].to(v.dtype) @ v


def _by_varlen(packed: list[torch.Tensor]) -> bool:
    """Whether torch's attention of rows of various lengths may take these tensors, and is right for such."""
    q, k, v = packed
    dtype = compute_dtype(q)
    if not q.is_cuda or dtype not in (torch.bfloat16, torch.float16) or q.shape[2] != v.shape[2]:
        return False
    return _varlen_right(q.device, dtype, q.shape[2], q.shape[1] // k.shape[1])


def _varlen(packed: list[torch.Tensor], boundaries: torch.Tensor, longest: int, scale: float | None) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = packed
    dtype = compute_dtype(q)
    k, v = (_repeated_for_heads(x, q.shape[1]) for x in (k, v))
    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if scale is not None:
        causal["scale"] = scale
    q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
    found = varlen_attn(q, k, v, boundaries, boundaries, longest, longest, **causal)
    assert isinstance(found, torch.Tensor)
    return found


@functools.cache
def _varlen_right(device: torch.device, dtype: torch.dtype, width: int, groups: int) -> bool:
    """Whether it runs for heads of that width, and gives what attention row by row gives, forward and backward."""
    ends = [0, 5, 70, 71, 200]
    try:
        generator = torch.Generator(device).manual_seed(0)
        boundaries = torch.tensor(ends, dtype=torch.int32, device=device)
        drawn = [
            torch.randn(ends[-1], heads, width, device=device, dtype=dtype, generator=generator).requires_grad_()
            for heads in (2 * groups, 2, 2)
        ]
        with torch.enable_grad():
            found = _varlen(drawn, boundaries, 129, 0.3)
            weights = torch.randn(found.shape, device=device, dtype=dtype, generator=generator)
            ours = torch.autograd.grad((found * weights).sum(), drawn)
            parts = []
            for start, end in itertools.pairwise(ends):
                q, k, v = (x[start:end].transpose(0, 1)[None].double() for x in drawn)
                k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
                parts.append(_by_scores(q, k, v, None, 0.3, None, None)[0].transpose(0, 1))
            expected = torch.cat(parts)
            theirs = torch.autograd.grad((expected * weights).sum(), drawn)
        pairs = zip((found.detach(), *ours), (expected.detach(), *theirs), strict=True)
        return all(float((a - b).norm()) <= 2.0**-6 * float(b.norm()) for a, b in pairs)
    except Exception:  # not there, or not for such heads or such a device
        return False
