"""The arithmetic of attention rows, from the query, key, value and mask that reach a reader's attention.

Two ways lead here. Where a reader calls `torch.nn.functional.scaled_dot_product_attention`, `ragkit.attention` listens to
that call and only the rows asked for are computed again. Where it reaches only transformers' attention interface (Gemma
2: soft-capping), the function registered here computes its output in blocks of queries, and tells the listener of them.
Neither makes anything of size tokens x tokens. The softmax is taken in float32, or in float64 where the inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

REGISTERED = "ragkit_blockwise"
BLOCK = 256  # queries of one block: at 4,096 tokens and 12 heads a block of logits is 50 MB
HARMLESS = {
    "sliding_window",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}  # no arithmetic


class AttentionError(Exception):
    """Attention that cannot be recorded, or is not a number."""


@dataclass(frozen=True)
class LazyMask:
    """What may be attended to, worked out for some rows at a time; `settings` are those of transformers' `sdpa_mask`."""

    settings: dict[str, Any]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the mask, `[batch, 1, stop - start, keys]`, True where a key may be attended to."""
        here = {
            "q_length": stop - start,
            "q_offset": self.settings["q_offset"] + start,
            "allow_is_causal_skip": False,
            "allow_is_bidirectional_skip": False,
        }
        mask = sdpa_mask(**{**self.settings, **here})
        assert mask is not None  # it is left out only where skipping is allowed
        return mask


@dataclass(frozen=True)
class Call:
    """One call of a reader's attention.

    `query` `[batch, heads, queries, size]`, `key` `[batch, kv heads, keys, size]`, `value` `[batch, kv heads, keys, value
    size]`; `mask` boolean (True: attend) or additive, broadcastable to `[batch, heads, queries, keys]`. With `is_causal`
    query i attends to keys 0..i, as in the fused kernel. `scale` None is 1 / sqrt(size).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | LazyMask | None = None
    is_causal: bool = False
    scale: float | None = None
    softcap: float | None = None


listener: ContextVar[Callable[[Call], None] | None] = ContextVar("listener", default=None)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
) -> Tensor:
    """Softmax of query times key `[batch, heads, queries, keys]`; each key head serves a group of query heads."""
    batch, heads, queries, size = query.shape
    grouped = wide(query).reshape(batch, key.shape[1], -1, size)
    logits = (grouped @ wide(key).transpose(-1, -2)).view(batch, heads, queries, -1)
    logits = logits * (1 / math.sqrt(size) if scale is None else scale)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, -math.inf)
            if mask.dtype == torch.bool
            else logits + mask.to(logits.dtype)
        )
    return logits.softmax(-1)


def rows_of_mask(call: Call, rows: Tensor) -> Tensor | None:
    """The mask of `rows` `[batch, rows]`, `[batch, 1 or heads, rows, keys]`, with causality in it; None: all is seen."""
    batch, keys = rows.shape[0], call.key.shape[2]
    each = torch.arange(batch, device=rows.device)[:, None]
    if isinstance(call.mask, LazyMask):
        positions, places = rows.unique(return_inverse=True)
        part = torch.cat([call.mask.rows(i, i + 1) for i in positions.tolist()], dim=2)
        return part.expand(batch, -1, -1, -1)[each, :, places].transpose(1, 2)
    causal = (
        torch.arange(keys, device=rows.device) <= rows[:, None, :, None] if call.is_causal else None
    )
    if call.mask is None:
        return causal
    whole = call.mask[(None,) * (4 - call.mask.dim())]
    part = whole.expand(batch, -1, call.query.shape[2], keys)[each, :, rows].transpose(1, 2)
    if causal is None:
        return part
    return part & causal if part.dtype == torch.bool else part.masked_fill(~causal, -math.inf)


def attention_rows(call: Call, rows: Tensor) -> Tensor:
    """Attention of `rows` `[batch, rows]` (query positions), `[batch, heads, rows, keys]`, as the kernel uses it."""
    with torch.autocast(call.query.device.type, enabled=False):
        picked = call.query[
            torch.arange(rows.shape[0], device=rows.device)[:, None], :, rows
        ].transpose(1, 2)
        return probabilities(picked, call.key, rows_of_mask(call, rows), call.scale, call.softcap)


def value_norms(call: Call) -> Tensor:
    """Lengths of the value vectors `[batch, heads, keys]`, a key head's repeated for each query head it serves."""
    return (
        wide(call.value)
        .norm(dim=-1)
        .repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)
    )


def blockwise_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention `[batch, queries, heads, size]` for transformers' attention interface, a block of queries at a time.

    Raises AttentionError if the model asks for something this function does not know, such as learned sinks: the numbers
    would be another model's.
    """
    unknown = sorted(
        name for name, given in others.items() if given is not None and name not in HARMLESS
    )
    if unknown or dropout > 0 or attention_mask is None:
        trouble = (
            f"hands {', '.join(unknown)} to its attention"
            if unknown
            else "uses dropout"
            if dropout > 0
            else "builds its own mask"
        )
        raise AttentionError(
            f"{type(module).__name__} {trouble}, which the recorder does not know: its attention cannot be recorded. Use another reader."
        )
    call = Call(query, key, value, attention_mask, scale=scaling, softcap=softcap)
    tell = listener.get()
    if tell is not None:
        tell(call)
    blocks, values = [], wide(value)
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, query.shape[2], BLOCK):
            stop = min(start + BLOCK, query.shape[2])
            mask = (
                attention_mask.rows(start, stop)
                if isinstance(attention_mask, LazyMask)
                else attention_mask[:, :, start:stop]
            )
            alpha = probabilities(query[:, :, start:stop], key, mask, scaling, softcap)
            if mask.dtype == torch.bool:
                alpha = alpha.masked_fill(
                    ~mask.any(-1, keepdim=True), 0.0
                )  # padding that sees nothing gets nothing, as in the fused kernel
            grouped = alpha.reshape(alpha.shape[0], value.shape[1], -1, alpha.shape[-1]) @ values
            blocks.append(grouped.view(*alpha.shape[:3], -1).to(value.dtype))
    return torch.cat(blocks, dim=2).transpose(1, 2).contiguous(), None


def lazy_mask(**settings: Any) -> LazyMask:
    """What transformers calls to make a mask for `blockwise_attention`."""
    return LazyMask(settings)


AttentionInterface.register(REGISTERED, blockwise_attention)
AttentionMaskInterface.register(REGISTERED, lazy_mask)
