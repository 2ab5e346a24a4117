"""Exact rows of attention and value norms, recorded while a reader runs its forward pass.

Every fused path of transformers ends in `torch.nn.functional.scaled_dot_product_attention`; what
reaches it is all that a row needs. Only the rows asked for are computed, nothing of size tokens x
tokens is made, and the eager path is not used (Falcon's adds its ALiBi bias twice). Readers without
a fused path are recorded through transformers' attention interface, or refused. The forward pass
stops when the last layer's attention has been seen.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel

from .kernels import AttentionError, unfit
from .watch import Visit, Watch

TRIED = 4  # tokens of text at most, and of padding, of the prompt that `_left_padding` tries
_tried: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()  # what `_left_padding` found


@dataclass(frozen=True)
class Record:
    """What one forward pass showed.

    `alpha` `[layers, batch, heads, rows, tokens]`: attention of the rows asked for, 0 on padding.
    `norms` `[layers, batch, heads, tokens]`: length of a head's value vectors, before the output
    projection.
    """

    alpha: Tensor
    norms: Tensor


def _decoder_layers(reader: PreTrainedModel, encoder_decoder: bool) -> nn.ModuleList:
    """The layers of the decoder. Raises AttentionError if its attention cannot be recorded."""
    name, usual = type(reader).__name__, reader.config._attn_implementation
    by_interface = reader._supports_attention_backend and reader._can_set_attn_implementation()
    if usual != "sdpa" and reader._supports_sdpa:
        raise AttentionError(
            f"{name} is set to attention by {usual!r}, which cannot be recorded: take that out of "
            "its config.json, or load it with attn_implementation='sdpa'."
        )
    if usual != "sdpa" and not by_interface:
        raise unfit(reader, "computes attention in code of its own")
    if bool(reader.config.is_encoder_decoder) != encoder_decoder:
        kind, use = ("no", "record") if encoder_decoder else ("an", "record_cross")
        raise AttentionError(f"{name} is {kind} encoder-decoder: use {use}.")
    if reader.training:
        raise AttentionError(f"{name} is in training mode, with dropout: call reader.eval() first.")
    stack: Any = reader.get_decoder()
    if not isinstance(stack, PreTrainedModel):  # some call their head so
        stack = reader.base_model
    number = getattr(stack.config.get_text_config(decoder=True), "num_hidden_layers", None)
    for module in stack.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise unfit(reader, f"has no list of {number} layers, so they cannot be told apart")


def _check(ids: Tensor, mask: Tensor, rows: Tensor) -> None:
    """Raises AttentionError if ids, mask and rows do not fit each other."""
    fits = ids.dim() == mask.dim() == 2 and ids.shape[0] == mask.shape[0]
    if not fits or not 0 < ids.shape[1] <= mask.shape[1]:
        raise AttentionError(f"Ids {list(ids.shape)} and mask {list(mask.shape)} do not fit.")
    if not mask.bool().any(1).all():
        raise AttentionError("A prompt of the batch has no token that is not padding.")
    if rows.dim() != 2 or rows.shape[0] != len(ids) or rows.dtype != torch.long:
        found = f"{rows.dtype} {list(rows.shape)}"
        raise AttentionError(f"Rows must be whole numbers [batch {len(ids)}, rows], not {found}.")
    if rows.numel() == 0 or int(rows.min()) < 0 or int(rows.max()) >= ids.shape[1]:
        raise AttentionError(f"Rows must be at least one, between 0 and {ids.shape[1] - 1}.")
    before = mask.shape[1] - ids.shape[1]
    if not mask.gather(1, rows.to(mask.device) + before).bool().all():
        raise AttentionError("A row stands on padding: give places of real tokens.")


def _takes_positions(reader: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(reader.base_model.forward).parameters


@torch.no_grad()
def _left_padding(reader: PreTrainedModel, ids: Tensor, pad: int) -> bool:
    """Whether `pad` on the left changes nothing in what the reader makes of `ids` `[tokens]`.

    Positions are given if the reader takes them; then they must be those that it takes by itself
    where nothing is padded (RoBERTa's begin behind its padding index). Each reader is tried once.
    """
    if reader in _tried:
        return _tried[reader]

    def states(padding: int, positions: bool) -> Tensor:
        padded = nn.functional.pad(ids[None, :TRIED], (padding, 0), value=pad)
        places = torch.arange(padded.shape[1], device=ids.device)[None] - padding
        given = {"input_ids": padded, "attention_mask": (places >= 0).long()}
        given |= {"position_ids": places.clamp(min=0)} if positions else {}
        return reader.base_model(**given, use_cache=False)[0][:, padding:]

    usual, takes = states(0, False), _takes_positions(reader)
    apart = (states(TRIED, takes) - usual).double().norm() / usual.double().norm()
    right = bool(apart < torch.finfo(usual.dtype).eps ** 0.5)  # rounding may differ
    _tried[reader] = right and (not takes or torch.equal(states(0, True), usual))
    return _tried[reader]


def _positions(reader: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Position ids for `ids` where padding before a token makes the reader's own wrong."""
    places, real = mask.long().cumsum(1) - 1, mask.bool()
    usual = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    if torch.equal(places[real], usual[real]):
        return {}
    before = mask.shape[1] - ids.shape[1]
    here = real[:, before:]
    pad = ids[0, 0] if here.all() else ids[~here][0]
    if not _left_padding(reader, ids[here], int(pad)):
        raise AttentionError(
            f"{type(reader).__name__} counts positions in its own way, shifted by padding on the "
            "left: pad on the right, or read one prompt at a time."
        )
    return {"position_ids": places.clamp(min=0)[:, before:]} if _takes_positions(reader) else {}


def observe(
    reader: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    rows: Tensor,
    visit: Visit,
    past: Cache | None = None,
) -> None:
    """Hands each layer's rows and value norms to `visit` while a decoder reads `ids`, in order.

    `ids` `[batch, tokens]`; `mask` `[batch, past + tokens]` is 1 on real tokens; `rows` `[batch,
    rows]` are places in `ids`. `past` is a dynamic cache: it holds the tokens before `ids`, and
    afterwards these too, in all layers. Can be differentiated where the caller's mode is so. Raises
    AttentionError before any work if the reader cannot be recorded or the input makes no sense,
    and after it if a layer went unseen, attention is no number, or fell on padding or later tokens.
    """
    layers = _decoder_layers(reader, encoder_decoder=False)
    _check(ids, mask, rows)
    before, held = mask.shape[1] - ids.shape[1], 0 if past is None else past.get_seq_length()
    if before != held:
        raise AttentionError(f"The mask has {before} tokens before the ids, the cache {held}.")
    ids, mask = ids.to(reader.device), mask.to(reader.device)
    inputs = {"input_ids": ids, "attention_mask": mask, **_positions(reader, ids, mask)}
    model: Any = reader.base_model
    with Watch(layers, mask.bool(), rows, visit).open(reader):
        model(**inputs, past_key_values=past, use_cache=past is not None)


@torch.no_grad()
def record(
    reader: PreTrainedModel, ids: Tensor, mask: Tensor, rows: Tensor, past: Cache | None = None
) -> Record:
    """The attention of `rows` in every layer and head, a cache's tokens included; see `observe`."""
    return _kept(lambda visit: observe(reader, ids, mask, rows, visit, past))


def observe_cross(
    reader: PreTrainedModel, states: Tensor, mask: Tensor, ids: Tensor, rows: Tensor, visit: Visit
) -> None:
    """As `observe`, for the cross-attention of an encoder-decoder: tokens are the encoder's.

    `states` `[batch, tokens, size]` and `mask` `[batch, tokens]` come from the encoder (FiD: all
    passages', one after another), `ids` `[batch, answer]` go into the decoder, right-padded; `rows`
    are places in `ids`.
    """
    layers = _decoder_layers(reader, encoder_decoder=True)
    _check(ids, torch.ones_like(ids), rows)
    _check(states[..., 0], mask, mask.argmax(1, keepdim=True))
    decoder: Any = reader.get_decoder()
    inputs = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    with Watch(layers, mask.bool(), rows, visit, cross=True).open(reader):
        decoder(input_ids=ids, use_cache=False, **inputs)


@torch.no_grad()
def record_cross(
    reader: PreTrainedModel, states: Tensor, mask: Tensor, ids: Tensor, rows: Tensor
) -> Record:
    """The cross-attention of `rows` in every decoder layer and head; see `observe_cross`."""
    return _kept(lambda visit: observe_cross(reader, states, mask, ids, rows, visit))


def _kept(run: Callable[[Visit], None]) -> Record:
    layers: list[tuple[Tensor, Tensor]] = []
    run(lambda alpha, norms: layers.append((alpha, norms)))
    return Record(*(torch.stack(part) for part in zip(*layers, strict=True)))


@torch.no_grad()
def record_generation(
    reader: PreTrainedModel, ids: Tensor, mask: Tensor, new_tokens: int, pad: int
) -> tuple[Tensor, Record]:
    """Greedy generation, and its record.

    `ids` and `mask` `[batch, tokens]` are padded on the left. Returns the new tokens `[batch,
    new]`, `pad` behind an end token, and a Record whose row i is the position that predicted new
    token i (behind the end: the last one again). The last new token is never read, so it is no key.
    Of the reader's generation_config.json only the end token counts.
    """
    if not mask[:, -1:].all():
        raise AttentionError("Prompts must be padded on the left for generation.")
    _decoder_layers(reader, encoder_decoder=False)
    _check(ids, mask, torch.full((len(ids), 1), ids.shape[1] - 1))
    ids, mask = ids.to(reader.device), mask.to(reader.device)
    if not _left_padding(reader, ids[mask.bool()], pad):
        # transformers counts a generation's positions so, whatever the reader's own are.
        raise AttentionError(f"{type(reader).__name__}'s positions go wrong while it generates.")
    model: Any = reader
    usual = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=usual.eos_token_id, pad_token_id=pad)
    try:
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens)
    finally:
        model.generation_config = usual
    new, end = out[:, ids.shape[1] :], usual.eos_token_id
    ended = torch.isin(new, torch.tensor(-1 if end is None else end, device=new.device)).long()
    going = ended.cumsum(1) - ended == 0  # up to the end token, it included
    rows = going.cumsum(1) + ids.shape[1] - 2
    read = torch.cat([mask, going[:, :-1].to(mask)], 1)
    return new, record(reader, out[:, :-1], read, rows)


@torch.no_grad()
def read_prefix(reader: PreTrainedModel, ids: Tensor, mask: Tensor) -> Cache:
    """A cache of `ids` `[batch, tokens]` (padded on the left), to read endings after: `branch`."""
    cache = DynamicCache(config=reader.config)
    last = torch.full((len(ids), 1), ids.shape[1] - 1)
    observe(reader, ids, mask, last, lambda alpha, norms: None, cache)
    return cache


def branch(cache: Cache) -> Cache:
    """A cache that grows on its own. Tensors are shared: it grows by making new ones."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin
