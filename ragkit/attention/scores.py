"""From attention rows to token contributions, and from these to passage scores."""

from collections.abc import Callable

import torch
from torch import Tensor

from .kernels import AttentionError
from .record import Record, stacked
from .watch import Visit


def pool(alpha: Tensor, norms: Tensor, uses: Tensor) -> tuple[Tensor, Tensor]:
    """Token contributions `[groups, ..., batch, tokens]`, without and with the value norm.

    Means of `alpha` `[..., batch, heads, rows, tokens]` (times `norms` `[..., batch, heads,
    tokens]`), of a layer or of all, over heads and a group's rows, weighed by `uses` `[groups,
    batch, rows]`.
    """
    share = (uses / uses.sum(-1, keepdim=True)).to(alpha)
    by_head = torch.einsum("...bhrt,gbr->g...bht", alpha, share)
    return by_head.mean(-2), (by_head * norms).mean(-2)


def pooled(run: Callable[[Visit], None], uses: Tensor) -> Tensor:
    """Token contributions `[norm (off, on), layers, groups, batch, tokens]`, without gradients.

    They are reduced layer by layer while `run` observes; `uses` as in `pool`. Example:
    `pooled(lambda visit: observe(reader, ids, mask, rows, visit), uses)`.
    """
    if not uses.sum(-1).gt(0).all():
        raise AttentionError("A group of rows is empty for a prompt of the batch: it has no mean.")

    def reduced(visit: Visit) -> None:
        run(lambda alpha, norms: visit(*pool(alpha, norms, uses)))

    return torch.stack(stacked(reduced))


def contributions(record: Record, rows: Tensor, norm: bool = True) -> Tensor:
    """Token contributions per layer `[layers, batch, tokens]` from a Record: see `pool`.

    `rows` `[batch, rows]` weighs the recorded rows. Without `norm` it is plain attention.
    """
    return pool(record.alpha, record.norms, rows[None])[int(norm)][0]


def passage_scores(tokens: Tensor, owner: Tensor, k: int, pooling: str = "sum") -> Tensor:
    """Passage scores `[..., k]` from token contributions `[..., tokens]`.

    `owner` `[tokens]` is a token's passage, or negative; `pooling` is "sum" or "mean". A passage
    without a token scores 0.
    """
    if k < 1 or owner.shape != tokens.shape[-1:]:
        told = f"{tokens.shape[-1]} tokens with {len(owner)} owners"
        raise AttentionError(f"Scores of {k} passages cannot be made from {told}.")
    own = (owner[:, None] == torch.arange(k, device=owner.device)).to(tokens)
    sums = tokens @ own
    return sums / own.sum(0).clamp(min=1) if pooling == "mean" else sums
