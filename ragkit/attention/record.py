"""Exact rows of attention and value norms, recorded while a reader runs its ordinary forward pass.

Every fused path of transformers ends in `torch.nn.functional.scaled_dot_product_attention`; the query, key, value and
mask that reach it are all that a row of attention needs. So only the rows asked for are computed, nothing of size
tokens x tokens is made, and Falcon's doubled ALiBi bias on the eager path (field-notes, section 2) is not met. A reader
without a fused path is recorded through transformers' attention interface, and refused if it has neither. The forward
pass stops when the last layer's attention has been seen: its output and the language-model head are not computed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ragkit.attention.kernels import AttentionError
from ragkit.attention.watch import Visit, Watch


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


def _decoder_layers(reader: PreTrainedModel, encoder_decoder: bool) -> nn.ModuleList:
    """The layers of the decoder. Raises AttentionError if the reader's attention cannot be recorded, before any work."""
    name, usual = type(reader).__name__, reader.config._attn_implementation
    if usual != "sdpa" and reader._supports_sdpa:
        raise AttentionError(
            f"{name} computes attention by {usual!r}; load it with attn_implementation='sdpa'."
        )
    if usual != "sdpa" and not (
        reader._supports_attention_backend and reader._can_set_attn_implementation()
    ):
        raise AttentionError(
            f"{name} computes attention in code of its own: neither the fused kernel nor transformers' attention interface is used, "
            "so it cannot be recorded. Use another reader."
        )
    if bool(reader.config.is_encoder_decoder) != encoder_decoder:
        right = (
            "record_cross, with the encoder's states"
            if reader.config.is_encoder_decoder
            else "record"
        )
        raise AttentionError(
            f"{name} is {'an' if reader.config.is_encoder_decoder else 'no'} encoder-decoder: use {right}."
        )
    if reader.training:
        raise AttentionError(
            f"{name} is in training mode, its dropout makes attention random: call reader.eval() first."
        )
    stack: Any = reader.get_decoder() if encoder_decoder else reader.base_model
    number = int(stack.config.get_text_config(decoder=True).num_hidden_layers)
    for module in stack.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise AttentionError(
        f"{name}: no list of {number} layers was found in it, so they cannot be told apart. Use another reader."
    )


def _check_rows(rows: Tensor, batch: int, queries: int) -> None:
    if rows.dim() != 2 or rows.shape[0] != batch or rows.dtype != torch.long:
        raise AttentionError(
            f"Rows must be whole numbers [batch, rows] with batch {batch}, not {rows.dtype} {list(rows.shape)}."
        )
    if rows.numel() == 0 or int(rows.min()) < 0 or int(rows.max()) >= queries:
        raise AttentionError(
            f"Rows must lie between 0 and {queries - 1}, and there must be at least one."
        )


def _check_tokens(ids: Tensor, mask: Tensor) -> None:
    if (
        ids.dim() != 2
        or mask.dim() != 2
        or ids.shape[0] != mask.shape[0]
        or not 0 < ids.shape[1] <= mask.shape[1]
    ):
        raise AttentionError(
            f"Ids [batch, tokens] and mask [batch, past + tokens] do not fit: {list(ids.shape)} and {list(mask.shape)}."
        )
    if not mask.bool().any(1).all():
        raise AttentionError("A prompt of the batch has no token that is not padding.")


def observe(
    reader: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    rows: Tensor,
    visit: Visit,
    past: Cache | None = None,
    gradient: bool = False,
) -> None:
    """Runs a decoder over `ids` `[batch, tokens]` and hands each layer's rows and value norms to `visit`, in order.

    `mask` `[batch, past + tokens]` is 1 on real tokens, `rows` `[batch, rows]` are places in `ids`. `past` is a dynamic
    cache: it holds the tokens before `ids`, and these too afterwards, in all layers. With `gradient` what `visit` gets
    can be differentiated. Raises AttentionError before any work if the reader's attention cannot be recorded or the input
    makes no sense, and after it if a layer went unseen, a number is not finite, or attention fell on padding.
    """
    layers = _decoder_layers(reader, encoder_decoder=False)
    _check_tokens(ids, mask)
    _check_rows(rows, len(ids), ids.shape[1])
    before = mask.shape[1] - ids.shape[1]
    if not mask.gather(1, rows.to(mask.device) + before).bool().all():
        raise AttentionError(
            "A row stands on padding, where attention means nothing: give places of real tokens."
        )
    if before != (0 if past is None else past.get_seq_length()):
        raise AttentionError(
            f"The mask has {before} tokens before the ids, the cache {0 if past is None else past.get_seq_length()}."
        )
    ids, mask = ids.to(reader.device), mask.to(reader.device)
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "past_key_values": past,
        "use_cache": past is not None,
    }
    if "position_ids" in inspect.signature(reader.base_model.forward).parameters:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[
            :, before:
        ]  # left padding must not shift positions
    model: Any = reader.base_model
    watch = Watch(layers, mask.bool(), rows, visit, past=before)
    with torch.set_grad_enabled(gradient), watch.open(reader):
        model(**inputs)


def record(
    reader: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    rows: Tensor,
    past: Cache | None = None,
    gradient: bool = False,
) -> Record:
    """The attention of `rows` in every layer and head, tokens of a cache included; arguments and errors as in `observe`."""
    return _kept(lambda visit: observe(reader, ids, mask, rows, visit, past, gradient))


def observe_cross(
    reader: PreTrainedModel,
    states: Tensor,
    mask: Tensor,
    ids: Tensor,
    rows: Tensor,
    visit: Visit,
    gradient: bool = False,
) -> None:
    """As `observe`, for the cross-attention of an encoder-decoder: tokens are the encoder's.

    `states` `[batch, tokens, size]` and `mask` `[batch, tokens]` come from the encoder (FiD: those of all passages, one
    after another), `ids` `[batch, answer]` go into the decoder, right-padded; `rows` are places in `ids`.
    """
    layers = _decoder_layers(reader, encoder_decoder=True)
    _check_tokens(ids, torch.ones_like(ids))
    _check_tokens(states[..., 0], mask)
    _check_rows(rows, len(states), ids.shape[1])
    decoder: Any = reader.get_decoder()
    watch = Watch(layers, mask.bool(), rows, visit, cross=True)
    with torch.set_grad_enabled(gradient), watch.open(reader):
        decoder(
            input_ids=ids,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            use_cache=False,
        )


def record_cross(
    reader: PreTrainedModel,
    states: Tensor,
    mask: Tensor,
    ids: Tensor,
    rows: Tensor,
    gradient: bool = False,
) -> Record:
    """The cross-attention of `rows` over the encoder's tokens, in every decoder layer and head; see `observe_cross`."""
    return _kept(lambda visit: observe_cross(reader, states, mask, ids, rows, visit, gradient))


def _kept(run: Callable[[Visit], None]) -> Record:
    layers: list[tuple[Tensor, Tensor]] = []
    run(lambda alpha, norms: layers.append((alpha, norms)))
    return Record(
        torch.stack([alpha for alpha, _ in layers]),
        torch.stack([norms for _, norms in layers]),
        tuple(range(len(layers))),
    )


@torch.no_grad()
def record_generation(
    reader: PreTrainedModel, ids: Tensor, mask: Tensor, new_tokens: int, pad: int
) -> tuple[Tensor, Record]:
    """Greedy generation with a key-value cache, recorded as it goes.

    `ids` and `mask` `[batch, tokens]` are padded on the left. Returns the new tokens `[batch, new]`, filled with `pad`
    behind an end token, and a Record whose row i is the position that predicted new token i (zero beyond it). The last
    new token is never read, so it is no key.
    """
    layers = _decoder_layers(reader, encoder_decoder=False)
    _check_tokens(ids, mask)
    if not mask[:, -1].all():
        raise AttentionError("Prompts must be padded on the left for generation.")
    ids, mask = ids.to(reader.device), mask.to(reader.device)
    steps: list[tuple[Tensor, Tensor]] = []
    generate: Any = reader.generate
    watch = Watch(
        layers,
        nn.functional.pad(mask.bool(), (0, new_tokens), value=True),
        None,
        lambda a, n: steps.append((a, n)),
        stop=False,
    )
    with watch.open(reader):
        out = generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
    width, number = steps[-1][1].shape[-1], len(layers)
    rows = [nn.functional.pad(alpha, (0, width - alpha.shape[-1])) for alpha, _ in steps]
    alpha = torch.stack([torch.cat(rows[layer::number], dim=2) for layer in range(number)])
    return out[:, ids.shape[1] :], Record(
        alpha, torch.stack([norms for _, norms in steps[-number:]]), tuple(range(number))
    )


def read_prefix(reader: PreTrainedModel, ids: Tensor, mask: Tensor) -> Cache:
    """A cache of `ids` `[batch, tokens]` (padded on the left), to read several endings after it; see `branch`."""
    cache = DynamicCache(config=reader.config)
    last = torch.full((len(ids), 1), ids.shape[1] - 1)
    observe(reader, ids, mask, last, lambda alpha, norms: None, cache)
    return cache


def branch(cache: Cache) -> Cache:
    """A cache that grows on its own. The tensors are shared: a dynamic cache grows by making new ones."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def pool(alpha: Tensor, norms: Tensor, uses: Tensor) -> tuple[Tensor, Tensor]:
    """Token contributions of one layer `[groups, batch, tokens]`, without and with the value norm.

    The mean over heads and over a group's rows of alpha (times the value norm). alpha `[batch, heads, rows, tokens]`,
    norms `[batch, heads, tokens]`; `uses` `[groups, batch, rows]` weighs the rows of a group (1 use, 0 leave out).
    """
    share = (uses / uses.sum(-1, keepdim=True)).to(alpha)
    by_head = torch.einsum("bhrt,gbr->gbht", alpha, share)
    return by_head.mean(2), (by_head * norms).mean(2)


def pooled(run: Callable[[Visit], None], uses: Tensor) -> Tensor:
    """Token contributions `[norm (off, on), layers, groups, batch, tokens]`, reduced layer by layer while `run` observes.

    `uses` `[groups, batch, rows]`: see `pool`. Example: `pooled(lambda visit: observe(reader, ids, mask, rows, visit), uses)`.
    """
    if not uses.sum(-1).gt(0).all():
        raise AttentionError(
            "A group of rows is empty for a prompt of the batch: its contributions would not be numbers."
        )
    layers: list[tuple[Tensor, Tensor]] = []
    run(lambda alpha, norms: layers.append(pool(alpha, norms, uses)))
    return torch.stack([torch.stack(part) for part in zip(*layers, strict=True)])


def contributions(record: Record, rows: Tensor, norm: bool = True) -> Tensor:
    """Token contributions per layer `[layers, batch, tokens]` from a Record: see `pool`.

    `rows` `[batch, rows]` weighs the recorded rows (1 use, 0 leave out). Without `norm` it is plain attention.
    """
    return torch.stack(
        [
            pool(alpha, norms, rows[None])[int(norm)][0]
            for alpha, norms in zip(record.alpha, record.norms, strict=True)
        ]
    )


def passage_scores(tokens: Tensor, owner: Tensor, k: int, pooling: str = "sum") -> Tensor:
    """Passage scores `[..., k]` from token contributions `[..., tokens]`; `owner` `[tokens]` is a token's passage or -1.

    A passage without a token scores 0.
    """
    if k < 1 or owner.shape != tokens.shape[-1:]:
        raise AttentionError(
            f"Scores of {k} passages cannot be made from {tokens.shape[-1]} tokens with {len(owner)} owners."
        )
    own = (owner[:, None] == torch.arange(k, device=owner.device)).to(tokens)
    sums = tokens @ own
    return sums / own.sum(0).clamp(min=1) if pooling == "mean" else sums
