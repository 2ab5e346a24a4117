"""The arithmetic of attention rows, from the query, key, value and mask that reach a kernel."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


class AttentionError(Exception):
    """Attention that cannot be recorded, or is not a number."""


@dataclass(frozen=True)
class Call:
    """One call of a reader's attention: `query` `[batch, heads, queries, size]`, `key` and `value`
    `[batch, kv heads, keys, own size]`; `mask` boolean (True: attend) or additive, broadcastable to
    `[batch, heads, queries, keys]`. With `is_causal` query i attends to keys 0..i; `scale` None is
    1 / sqrt(size), as in the kernel."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    softcap: float | None = None


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, in which a softmax is made, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def attention_rows(call: Call, rows: Tensor) -> Tensor:
    """Attention `[batch, heads, rows, keys]` of query positions `rows` `[batch, rows]`."""
    each = torch.arange(len(rows), device=rows.device)[:, None]
    with torch.autocast(call.query.device.type, enabled=False):
        query, key = wide(call.query[each, :, rows].transpose(1, 2)), wide(call.key)
        batch, heads, count, size = query.shape
        grouped = query.reshape(batch, key.shape[1], -1, size)  # a key head serves several heads
        logits = (grouped @ key.transpose(-1, -2)).view(batch, heads, count, -1)
        logits = logits * (1 / math.sqrt(size) if call.scale is None else call.scale)
        if call.softcap is not None:
            logits = (logits / call.softcap).tanh() * call.softcap
        if call.is_causal:
            later = torch.arange(key.shape[2], device=rows.device) > rows[:, None, :, None]
            logits = logits.masked_fill(later, -math.inf)
        if call.mask is not None:
            whole = call.mask[(None,) * (4 - call.mask.dim())]
            whole = whole.expand(batch, -1, call.query.shape[2], key.shape[2])
            mask = whole[each, :, rows].transpose(1, 2)
            is_boolean = mask.dtype == torch.bool
            logits = logits.masked_fill(~mask, -math.inf) if is_boolean else logits + wide(mask)
        return logits.softmax(-1)


def value_norms(call: Call) -> Tensor:
    """Lengths of the value vectors `[batch, heads, keys]`, a key head's for each head it serves."""
    served = call.query.shape[1] // call.value.shape[1]
    return wide(call.value).norm(dim=-1).repeat_interleave(served, dim=1)
