"""Exact rows of attention and value norms, recorded while a reader runs its forward pass; token
contributions from these, and passage scores. Nothing of size tokens x tokens is made, and the eager
path is not used where there is another (Falcon's adds its ALiBi bias twice)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .kernels import AttentionError
from .watch import Visit, Watch, unfit


@dataclass(frozen=True)
class Record:
    """What one forward pass showed. `alpha` `[layers, batch, heads, rows, tokens]`: attention, 0 on
    padding; `norms` `[layers, batch, heads, tokens]`: of a head's values, not yet projected."""

    alpha: Tensor
    norms: Tensor


def _decoder_layers(reader: PreTrainedModel, encoder_decoder: bool) -> nn.ModuleList:
    """The layers of the decoder. Raises AttentionError if its attention cannot be recorded."""
    name, usual = type(reader).__name__, reader.config._attn_implementation
    if usual != "sdpa" and reader._supports_sdpa:
        told = f"{name} is set to attention by {usual!r}, which cannot be recorded: take it out of"
        raise AttentionError(f"{told} its config.json, or load it with attn_implementation='sdpa'.")
    by_interface = reader._supports_attention_backend and reader._can_set_attn_implementation()
    if usual != "sdpa" and not by_interface:
        raise unfit(name, "computes attention in code of its own")
    if bool(reader.config.is_encoder_decoder) != encoder_decoder:
        kind, use = ("no", "no") if encoder_decoder else ("an", "its encoder's")
        raise AttentionError(f"{name} is {kind} encoder-decoder: record it with {use} states.")
    if reader.training:
        raise AttentionError(f"{name} is in training mode, with dropout: call reader.eval() first.")
    stack: Any = reader.get_decoder()
    if not isinstance(stack, PreTrainedModel):  # some call their head so
        stack = reader.base_model
    number = getattr(stack.config.get_text_config(decoder=True), "num_hidden_layers", None)
    for module in stack.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise unfit(name, f"has no list of {number} layers, so they cannot be told apart")


def _check(ids: Tensor, mask: Tensor, rows: Tensor) -> None:
    """Raises AttentionError if ids, mask and rows do not fit each other."""
    tokens = ids.shape[-1]
    if ids.dim() != 2 or ids.shape != mask.shape or tokens == 0:
        raise AttentionError(f"Ids {list(ids.shape)} and mask {list(mask.shape)} do not fit.")
    if rows.dtype != torch.long or rows.dim() != 2 or len(rows) != len(ids) or not rows.numel():
        what = f"[batch {len(ids)}, at least one], not {rows.dtype} {list(rows.shape)}"
        raise AttentionError(f"Rows must be whole numbers {what}.")
    if int(rows.min()) < 0 or int(rows.max()) >= tokens:
        raise AttentionError(f"Rows must lie between 0 and {tokens - 1}.")
    if not mask.gather(1, rows.to(mask.device)).bool().all():
        raise AttentionError("A row stands on padding: give places of real tokens.")


def observe(reader: PreTrainedModel, ids: Tensor, mask: Tensor, rows: Tensor, visit: Visit) -> None:
    """Hands each layer's rows and value norms to `visit` while a decoder reads `ids`, in order.
    `ids` and `mask` (1 on real tokens) `[batch, tokens]`; `rows` `[batch, rows]` are places in
    `ids`. Can be differentiated where the caller's mode is so. Raises AttentionError before any
    work if the reader cannot be recorded or the input makes no sense, and after it if a layer went
    unseen, attention is no number, or fell on padding or later tokens."""
    layers = _decoder_layers(reader, encoder_decoder=False)
    _check(ids, mask, rows)
    ids, mask, rows = (given.to(reader.device) for given in (ids, mask, rows))
    # Padding goes behind the tokens: so a reader's own positions are right, however it counts them.
    order = (mask == 0).int().argsort(dim=1, stable=True)
    back = order.argsort(dim=1)
    ids, mask, rows = ids.gather(1, order), mask.gather(1, order), back.gather(1, rows)

    def in_place(alpha: Tensor, norms: Tensor) -> None:
        by_row = back[:, None, None].expand_as(alpha)
        visit(alpha.gather(-1, by_row), norms.gather(-1, back[:, None].expand_as(norms)))

    with Watch(layers, mask.bool(), rows, in_place).open(reader):
        reader.base_model(input_ids=ids, attention_mask=mask, use_cache=False)


def observe_cross(
    reader: PreTrainedModel, states: Tensor, mask: Tensor, ids: Tensor, rows: Tensor, visit: Visit
) -> None:
    """As `observe`, for the cross-attention of an encoder-decoder: tokens are the encoder's.
    `states` `[batch, tokens, size]` and `mask` `[batch, tokens]` come from it (FiD: of all passages
    in a row); `ids` `[batch, answer]`, right-padded, go into the decoder; `rows`: places there."""
    layers = _decoder_layers(reader, encoder_decoder=True)
    _check(ids, torch.ones_like(ids), rows)
    _check(states[..., 0], mask, mask.argmax(1, keepdim=True))
    inputs = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    with Watch(layers, mask.bool(), rows, visit, cross=True).open(reader):
        reader.get_decoder()(input_ids=ids, use_cache=False, **inputs)


def stacked(run: Callable[[Visit], None]) -> list[Tensor]:
    """The two tensors that `run` shows of each layer, each `[layers, ...]`, without gradients."""
    layers: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        run(lambda *layer: layers.append(layer))
    return [torch.stack(part) for part in zip(*layers, strict=True)]


def record(
    reader: PreTrainedModel, ids: Tensor, mask: Tensor, rows: Tensor, states: Tensor | None = None
) -> Record:
    """Attention of `rows` by layer and head (`observe`, or with `states` `observe_cross`)."""
    if states is None:
        return Record(*stacked(partial(observe, reader, ids, mask, rows)))
    return Record(*stacked(partial(observe_cross, reader, states, mask, ids, rows)))


def pool(alpha: Tensor, norms: Tensor, uses: Tensor) -> tuple[Tensor, Tensor]:
    """Token contributions by head `[groups, ..., batch, heads, tokens]`, without and with the value
    norm: means of `alpha` `[..., batch, heads, rows, tokens]` (times `norms` `[..., batch, heads,
    tokens]`) over a group's rows, weighed by `uses` `[groups, batch, rows]`."""
    share = (uses / uses.sum(-1, keepdim=True)).to(alpha)
    by_head = torch.einsum("...bhrt,gbr->g...bht", alpha, share)
    return by_head, by_head * norms


def pooled(run: Callable[[Visit], None], uses: Tensor) -> Tensor:
    """Token contributions `[norm (off, on), layers, groups, batch, heads, tokens]`, no gradients,
    reduced layer by layer while `run` observes; `uses` as in `pool`. Example:
    `pooled(partial(observe, reader, ids, mask, rows), uses)`."""
    if not uses.sum(-1).gt(0).all():
        raise AttentionError("A group of rows is empty for a prompt of the batch: it has no mean.")

    def reduced(visit: Visit) -> None:
        run(lambda alpha, norms: visit(*pool(alpha, norms, uses)))

    return torch.stack(stacked(reduced))


def contributions(record: Record, rows: Tensor, norm: bool = True) -> Tensor:
    """Token contributions per layer `[layers, batch, tokens]` from a Record: see `pool`. `rows`
    `[batch, rows]` weighs the recorded rows. Without `norm` it is plain attention."""
    return pool(record.alpha, record.norms, rows[None])[int(norm)][0].mean(-2)


def passage_scores(tokens: Tensor, owner: Tensor, k: int) -> Tensor:
    """Passage scores `[..., k]`, sums of token contributions `[..., tokens]`. `owner` `[tokens]` is
    a token's passage, or negative. Without a token a passage gets 0."""
    if k < 1 or owner.shape != tokens.shape[-1:]:
        told = f"{tokens.shape[-1]} tokens with {len(owner)} owners"
        raise AttentionError(f"Scores of {k} passages cannot be made from {told}.")
    return tokens @ (owner[:, None] == torch.arange(k, device=owner.device)).to(tokens)
