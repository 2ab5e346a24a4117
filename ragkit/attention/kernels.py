"""The arithmetic of attention rows, from the query, key, value and mask that reach a kernel.

Every fused path of transformers ends in `torch.nn.functional.scaled_dot_product_attention`: there
`watch` listens, and only the rows asked for are computed again. Where a reader has no such path
(Gemma 2), the function registered here with transformers' attention interface computes its output
in blocks of queries and tells the listener. The softmax is in float32, or wider as the inputs are.
"""

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

REGISTERED = "ragkit_blockwise"
BLOCK = 256  # queries of one block: at 4,096 tokens and 12 heads a block of logits is 50 MB
# What transformers may hand to an attention function without changing its arithmetic.
HARMLESS = {"sliding_window", "position_ids", "cache_position", "use_cache", "return_dict"}
HARMLESS |= {"output_attentions", "output_hidden_states"}


class AttentionError(Exception):
    """Attention that cannot be recorded, or is not a number."""


def unfit(reader: nn.Module | str, why: str) -> AttentionError:
    """The error for a reader, or what it is called, that cannot be recorded."""
    name = reader if isinstance(reader, str) else type(reader).__name__
    return AttentionError(f"{name} {why}: its attention cannot be recorded. Use another reader.")


@dataclass(frozen=True)
class LazyMask:
    """What may be attended to, worked out for some rows at a time.

    `settings` are those of transformers' `sdpa_mask`. A reader that works on its mask itself (cuts
    it, adds to it, asks for its shape) is refused: it would do so in tokens x tokens.
    """

    settings: dict[str, Any]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, `[batch, 1, stop - start, keys]`, True where a key is seen."""
        here = {"q_length": stop - start, "q_offset": self.settings["q_offset"] + start}
        never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask = sdpa_mask(**{**self.settings, **here, **never})
        assert mask is not None  # it is left out only where skipping is allowed
        return mask

    @classmethod
    def __torch_function__(cls, *unused: Any) -> NoReturn:
        raise unfit("The reader", "changes its attention mask in code of its own")

    __getitem__ = __torch_function__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying and printing look for
            raise AttributeError(name)
        return self.__torch_function__()


@dataclass(frozen=True)
class Call:
    """One call of a reader's attention.

    `query` `[batch, heads, queries, size]`, `key` and `value` `[batch, kv heads, keys, own size]`;
    `mask` boolean (True: attend) or additive, broadcastable to `[batch, heads, queries, keys]`.
    With `is_causal` query i attends to keys 0..i; `scale` None is 1 / sqrt(size), as in the kernel.
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


def fused_call(*args: Any, **kwargs: Any) -> Call:
    """The arguments of `scaled_dot_product_attention`, in the kernel's dtype under autocast."""
    places = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(places, args, strict=False)) | kwargs
    query, key, value = given["query"], given["key"], given["value"]
    device, causal = query.device.type, given.get("is_causal", False)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return Call(query, key, value, given.get("attn_mask"), causal, given.get("scale"))


def probabilities(query: Tensor, mask: Tensor | None, call: Call) -> Tensor:
    """Softmax of `query` `[batch, heads, queries, size]` times the call's keys, under `mask`.

    `[batch, heads, queries, keys]`; each key head serves a group of query heads.
    """
    batch, heads, queries, size = query.shape
    grouped = wide(query).reshape(batch, call.key.shape[1], -1, size)
    logits = (grouped @ wide(call.key).transpose(-1, -2)).view(batch, heads, queries, -1)
    logits = logits * (1 / math.sqrt(size) if call.scale is None else call.scale)
    if call.softcap is not None:
        logits = (logits / call.softcap).tanh() * call.softcap
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -math.inf)
    elif mask is not None:
        logits = logits + mask.to(logits.dtype)
    return logits.softmax(-1)


def rows_of_mask(call: Call, rows: Tensor) -> Tensor | None:
    """The mask of `rows` `[batch, rows]` with causality in it, `[batch, 1 or heads, rows, keys]`.

    Boolean or additive as the call's; None: all is seen.
    """
    batch, keys = rows.shape[0], call.key.shape[2]
    each = torch.arange(batch, device=rows.device)[:, None]
    if isinstance(call.mask, LazyMask):
        positions, places = rows.unique(return_inverse=True)
        part = torch.cat([call.mask.rows(i, i + 1) for i in positions.tolist()], dim=2)
        return part.expand(batch, -1, -1, -1)[each, :, places].transpose(1, 2)
    causal = torch.arange(keys, device=rows.device) <= rows[:, None, :, None]
    if call.mask is None:
        return causal if call.is_causal else None
    whole = call.mask[(None,) * (4 - call.mask.dim())]
    part = whole.expand(batch, -1, call.query.shape[2], keys)[each, :, rows].transpose(1, 2)
    if not call.is_causal:
        return part
    return part & causal if part.dtype == torch.bool else part.masked_fill(~causal, -math.inf)


def attention_rows(call: Call, rows: Tensor) -> Tensor:
    """Attention `[batch, heads, rows, keys]` of query positions `rows` `[batch, rows]`."""
    each = torch.arange(rows.shape[0], device=rows.device)[:, None]
    with torch.autocast(call.query.device.type, enabled=False):
        picked = call.query[each, :, rows].transpose(1, 2)
        return probabilities(picked, rows_of_mask(call, rows), call)


def value_norms(call: Call) -> Tensor:
    """Lengths of the value vectors `[batch, heads, keys]`, a key head's for each head it serves."""
    served = call.query.shape[1] // call.value.shape[1]
    return wide(call.value).norm(dim=-1).repeat_interleave(served, dim=1)


def blockwise_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention `[batch, queries, heads, size]`, a block of queries at a time.

    transformers' interface sets the names. Raises AttentionError if the model asks for something
    that is not known here, such as learned sinks: the numbers would be another model's.
    """
    scale, softcap = options.pop("scaling", None), options.pop("softcap", None)
    if options.pop("dropout", 0.0) > 0:
        raise unfit(module, "uses dropout")
    unknown = [name for name in options if options[name] is not None and name not in HARMLESS]
    if unknown:
        raise unfit(module, f"hands {', '.join(sorted(unknown))} to its attention")
    if attention_mask is None:
        raise unfit(module, "builds its own mask")
    call = Call(query, key, value, attention_mask, scale=scale, softcap=softcap)
    if (tell := listener.get()) is not None:
        tell(call)
    blocks, values = [], wide(value)
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, query.shape[2], BLOCK):
            stop = min(start + BLOCK, query.shape[2])
            if isinstance(attention_mask, LazyMask):
                mask = attention_mask.rows(start, stop)
            else:
                mask = attention_mask[:, :, start:stop]
            alpha = probabilities(query[:, :, start:stop], mask, call)
            if mask.dtype == torch.bool:
                # Padding that sees nothing gets nothing, as in the fused kernel.
                alpha = alpha.masked_fill(~mask.any(-1, keepdim=True), 0.0)
            grouped = alpha.reshape(alpha.shape[0], value.shape[1], -1, alpha.shape[-1]) @ values
            blocks.append(grouped.view(*alpha.shape[:3], -1).to(value.dtype))
    return torch.cat(blocks, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(REGISTERED, blockwise_attention)
AttentionMaskInterface.register(REGISTERED, lambda **settings: LazyMask(settings))
