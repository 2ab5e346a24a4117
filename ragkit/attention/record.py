"""Exact rows of attention and value norms, recorded while a reader runs its forward pass.

Only the rows asked for are computed, nothing of size tokens x tokens is made, and the eager path is
not used (Falcon's adds its ALiBi bias twice). The pass stops when the last layer's attention has
been seen.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .kernels import AttentionError, unfit
from .watch import Visit, Watch

TRIED = 4  # tokens of text at most, and of padding, with which `_positions` tries a reader


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
    if ids.dim() != 2 or ids.shape != mask.shape or ids.shape[1] == 0:
        raise AttentionError(f"Ids {list(ids.shape)} and mask {list(mask.shape)} do not fit.")
    if not mask.bool().any(1).all():
        raise AttentionError("A prompt of the batch has no token that is not padding.")
    if rows.dim() != 2 or rows.shape[0] != len(ids) or rows.dtype != torch.long:
        found = f"{rows.dtype} {list(rows.shape)}"
        raise AttentionError(f"Rows must be whole numbers [batch {len(ids)}, rows], not {found}.")
    if rows.numel() == 0 or int(rows.min()) < 0 or int(rows.max()) >= ids.shape[1]:
        raise AttentionError(f"Rows must be at least one, between 0 and {ids.shape[1] - 1}.")
    if not mask.gather(1, rows.to(mask.device)).bool().all():
        raise AttentionError("A row stands on padding: give places of real tokens.")


@torch.no_grad()
def _positions(reader: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Position ids where padding before a token makes the reader's own wrong.

    Raises AttentionError if a few tokens, tried with and without padding, show that the reader
    counts positions in its own way (RoBERTa's begin behind its padding index).
    """
    real = mask.bool()
    if not (~real).cumsum(1)[real].any():  # no padding stands before a token
        return {}
    takes = "position_ids" in inspect.signature(reader.base_model.forward).parameters
    some, pad = ids[real][None, :TRIED], int(ids[~real][0])

    def states(padding: int, given: bool) -> Tensor:
        padded = nn.functional.pad(some, (padding, 0), value=pad)
        at = torch.arange(padded.shape[1], device=ids.device)[None] - padding
        inputs = {"input_ids": padded, "attention_mask": (at >= 0).long()}
        inputs |= {"position_ids": at.clamp(min=0)} if given else {}
        return reader.base_model(**inputs, use_cache=False)[0][:, padding:]

    usual = states(0, False)
    apart = (states(TRIED, takes) - usual).double().norm() / usual.double().norm()
    right = bool(apart < torch.finfo(usual.dtype).eps ** 0.5)  # rounding may differ
    if not right or (takes and not torch.equal(states(0, True), usual)):
        raise AttentionError(
            f"{type(reader).__name__} counts positions in its own way, shifted by padding on the "
            "left: pad on the right, or read one prompt at a time."
        )
    return {"position_ids": (real.cumsum(1) - 1).clamp(min=0)} if takes else {}


def observe(reader: PreTrainedModel, ids: Tensor, mask: Tensor, rows: Tensor, visit: Visit) -> None:
    """Hands each layer's rows and value norms to `visit` while a decoder reads `ids`, in order.

    `ids` and `mask` (1 on real tokens) `[batch, tokens]`; `rows` `[batch, rows]` are places in
    `ids`. Can be differentiated where the caller's mode is so. Raises AttentionError before any
    work if the reader cannot be recorded or the input makes no sense, and after it if a layer went
    unseen, attention is no number, or fell on padding or later tokens.
    """
    layers = _decoder_layers(reader, encoder_decoder=False)
    _check(ids, mask, rows)
    ids, mask = ids.to(reader.device), mask.to(reader.device)
    inputs = {"input_ids": ids, "attention_mask": mask, **_positions(reader, ids, mask)}
    with Watch(layers, mask.bool(), rows, visit).open(reader):
        reader.base_model(**inputs, use_cache=False)


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
    inputs = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    with Watch(layers, mask.bool(), rows, visit, cross=True).open(reader):
        reader.get_decoder()(input_ids=ids, use_cache=False, **inputs)


def _recorded(run: Callable[[Visit], None]) -> Record:
    layers: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        run(lambda alpha, norms: layers.append((alpha, norms)))
    return Record(*(torch.stack(part) for part in zip(*layers, strict=True)))


def record(reader: PreTrainedModel, ids: Tensor, mask: Tensor, rows: Tensor) -> Record:
    """The attention of `rows` in every layer and head; see `observe`."""
    return _recorded(lambda visit: observe(reader, ids, mask, rows, visit))


def record_cross(
    reader: PreTrainedModel, states: Tensor, mask: Tensor, ids: Tensor, rows: Tensor
) -> Record:
    """The cross-attention of `rows` in every decoder layer and head; see `observe_cross`."""
    return _recorded(lambda visit: observe_cross(reader, states, mask, ids, rows, visit))
