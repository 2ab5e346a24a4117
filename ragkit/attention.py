"""Exact rows of attention and value norms, recorded while a reader runs its ordinary fused forward pass.

Every fused path of transformers ends in `torch.nn.functional.scaled_dot_product_attention`; the query, key, value and
mask that reach it are all that a row of attention needs. So only the rows asked for are computed, nothing of size
tokens x tokens is made, and Falcon's doubled ALiBi bias on the eager path (field-notes, section 2) is not met.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ragkit import RagkitError


class AttentionError(RagkitError):
    """Attention that cannot be recorded, or is not a number."""


@dataclass(frozen=True)
class Record:
    """What one forward pass showed.

    `alpha` `[layers, batch, heads, rows, tokens]`: attention probabilities of the rows asked for, zero on padding.
    `norms` `[layers, batch, heads, tokens]`: length of each value vector, per head, before the output projection.
    `layers`: which layers were recorded.
    """

    alpha: Tensor
    norms: Tensor
    layers: tuple[int, ...]


def rows_of_attention(query: Tensor, key: Tensor, rows: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """Softmax rows `[batch, heads, rows, keys]` in float32, as the fused kernel would have used them.

    query `[batch, heads, queries, size]`, key `[batch, kv_heads, keys, size]`, rows `[batch, rows]` (query positions),
    mask boolean (True: attend) or additive, broadcastable to `[batch, heads, queries, keys]`.
    """
    batch, heads, n_queries, size = query.shape
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    picked = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, size)).float()
    logits = picked @ key.float().transpose(-1, -2) * (1 / math.sqrt(size) if scale is None else scale)
    if is_causal:
        logits = logits.masked_fill(torch.arange(key.shape[2]) > rows[:, None, :, None], -math.inf)
    if mask is not None:
        mask = mask.expand(batch, mask.shape[1], n_queries, key.shape[2])
        part = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, key.shape[2]))
        logits = logits.masked_fill(~part, -math.inf) if part.dtype == torch.bool else logits + part.float()
    return logits.softmax(-1)


@contextmanager
def intercepted(rows: Tensor, alphas: list[Tensor], norms: list[Tensor]) -> Iterator[None]:
    """While open, every fused attention call also appends its rows and value norms."""
    original = torch.nn.functional.scaled_dot_product_attention

    def recording(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            alphas.append(rows_of_attention(query, key, rows, attn_mask, is_causal, scale))
            norms.append(value.float().norm(dim=-1).repeat_interleave(query.shape[1] // value.shape[1], dim=1))
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    torch.nn.functional.scaled_dot_product_attention = recording
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


@torch.no_grad()
def record(reader: PreTrainedModel, ids: Tensor, mask: Tensor, rows: Tensor) -> Record:
    """Runs the reader once over `ids` `[batch, tokens]` and records the attention of `rows` `[batch, rows]`.

    `mask` `[batch, tokens]` is 1 on real tokens. Raises AttentionError before any work if the reader does not use the
    fused kernel, and after it if a layer went unseen or a number is not finite.
    """
    if reader.config._attn_implementation != "sdpa":
        raise AttentionError(f"The reader computes attention by {reader.config._attn_implementation!r}; load it with attn_implementation='sdpa'.")
    if rows.numel() == 0 or int(rows.min()) < 0 or int(rows.max()) >= ids.shape[1]:
        raise AttentionError(f"Rows must lie between 0 and {ids.shape[1] - 1}, and there must be at least one.")
    alphas: list[Tensor] = []
    norms: list[Tensor] = []
    with intercepted(rows, alphas, norms):
        reader.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    layers = reader.config.num_hidden_layers
    if len(alphas) != layers:
        raise AttentionError(f"{len(alphas)} layers were seen, the model has {layers}: its attention cannot be recorded.")
    seen = mask[None, :, None, None, :].bool()
    alpha = torch.stack(alphas).masked_fill(~seen, 0.0)
    if not torch.isfinite(alpha).all() or not torch.isfinite(norms[-1]).all():
        raise AttentionError("Attention is not a number. The reader is broken, or overflows in its dtype: load it in float32.")
    return Record(alpha, torch.stack(norms).masked_fill(~seen[:, :, :, 0], 0.0), tuple(range(layers)))


def contributions(record: Record, rows: Tensor, norm: bool = True) -> Tensor:
    """Token contributions per layer `[layers, batch, tokens]`: mean over rows and heads of alpha times value norm.

    `rows` `[batch, rows]` weighs the recorded rows (1 use, 0 leave out). Without `norm` it is plain attention.
    """
    weighted = record.alpha * record.norms[:, :, :, None] if norm else record.alpha
    use = rows / rows.sum(1, keepdim=True)
    return torch.einsum("lbhrt,br->lbt", weighted, use.to(weighted.dtype)) / record.alpha.shape[2]


def passage_scores(tokens: Tensor, owner: Tensor, k: int, pooling: str = "sum") -> Tensor:
    """Passage scores `[k]` from token contributions `[tokens]`; `owner` `[tokens]` is the passage of a token or -1."""
    own = owner[None, :] == torch.arange(k)[:, None]
    sums = torch.where(own, tokens[None, :], 0.0).sum(1)
    return sums / own.sum(1).clamp(min=1) if pooling == "mean" else sums
