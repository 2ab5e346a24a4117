"""Listens to a reader's layers while they run, and makes sure it hears the right call of each.
Every fused path of transformers ends in `torch.nn.functional.scaled_dot_product_attention`, which
is heard as it is called. Where a reader has no such path (Gemma 2), transformers' attention
interface has it call REGISTERED, which listens, and then the reader's own eager function."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from .kernels import AttentionError, Call, attention_rows, value_norms

# Called once a layer with alpha [batch, heads, rows, tokens] and norms [batch, heads, tokens].
Visit = Callable[[Tensor, Tensor], None]
NONE = 1e-6  # attention that is none: an additive mask may leave a trace of what it hides
FUSED = torch.nn.functional.scaled_dot_product_attention
PLACES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # of its arguments
REGISTERED = "ragkit"
# What an eager function may get: what `Call` holds, and what changes nothing when not in training.
KNOWN = {"scaling", "softcap", "dropout", "sliding_window", "position_ids", "cache_position"}
KNOWN |= {"use_cache", "return_dict", "output_attentions", "output_hidden_states"}
AttentionMaskInterface.register(REGISTERED, eager_mask)


class AllSeen(Exception):
    """The last layer's attention was seen: the rest of the forward pass is not needed."""


def unfit(name: str, why: str) -> AttentionError:
    """The error for a reader, or a layer of it, that cannot be recorded."""
    return AttentionError(f"{name} {why}: its attention cannot be recorded. Use another reader.")


class Watch(TorchFunctionMode):
    """Listens to the attention calls of a decoder's layers, and checks what it hears. `seen`
    `[batch, tokens]` is True on tokens that are not padding; `rows` `[batch, rows]` are query
    positions. `cross`: the second call of each layer is meant, not the first."""

    def __init__(
        self, layers: nn.ModuleList, seen: Tensor, rows: Tensor, visit: Visit, cross: bool = False
    ) -> None:
        super().__init__()
        self.layers, self.seen, self.rows, self.visit, self.cross = layers, seen, rows, visit, cross
        self.calls, self.queries, self.done, self.inside = 0, 0, 0, False
        self.sound = torch.ones((), dtype=torch.bool, device=seen.device)
        self.complete, self.causal = self.sound.clone(), self.sound.clone()

    def enter_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a layer: it must be the next one; how many queries it gets."""
        if layer is not self.layers[self.done]:
            raise unfit(f"Layer {self.done}", "ran out of turn")
        self.calls, self.inside = 0, True
        self.queries = (args[0] if args else kwargs["hidden_states"]).shape[1]

    def leave_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a layer: its attention must have been seen."""
        if self.calls != 1 + self.cross:
            raise unfit(f"Layer {self.done}", f"attends {self.calls} times, not {1 + self.cross}")
        self.inside, self.done = False, self.done + 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is FUSED and self.inside:
            given = dict(zip(PLACES, args, strict=False)) | (kwargs or {})
            tensors, device = [given[name] for name in PLACES[:3]], given["query"].device.type
            if torch.is_autocast_enabled(device):  # then the kernel gets another dtype
                tensors = [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
            self.see(Call(*tensors, *(given.get(n) for n in ("attn_mask", "is_causal", "scale"))))
        return func(*args, **(kwargs or {}))

    def see_eager(self, module: nn.Module, *tensors: Any, **options: Any) -> tuple[Tensor, Any]:
        """A reader's own eager attention, seen first; transformers sets the arguments. Raises
        AttentionError if one is not known here, such as sinks: rows would be another model's."""
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        unknown = [name for name in options if options[name] is not None and name not in KNOWN]
        if own is None or unknown:
            why = f"hands {', '.join(sorted(unknown)) or 'all'} to attention of its own"
            raise unfit(type(module).__name__, why)
        scale, softcap = options.get("scaling"), options.get("softcap")
        self.see(replace(Call(*tensors), scale=scale, softcap=softcap))
        return own(module, *tensors, **options)

    def see(self, call: Call) -> None:
        """Takes a layer's attention call; ends the forward pass after the last layer's."""
        self.calls += 1
        if self.calls != 1 + self.cross:
            return
        found, wanted = (call.query.shape[2], call.key.shape[2]), (self.queries, self.seen.shape[1])
        if found != wanted:
            raise unfit(f"Layer {self.done}", f"has {found} queries and keys, not {wanted}")
        alpha = self.checked_rows(call, self.rows)
        norms = value_norms(call).to(alpha.device).masked_fill(~self.seen[:, None], 0.0)
        self.sound &= alpha.isfinite().all() & norms.isfinite().all()
        self.complete &= ((alpha.sum(-1) - 1).abs() < 1e-3).all()
        if not self.cross:
            # The rows asked for may be the last, before which everything lies: the first one tells.
            self.checked_rows(call, torch.zeros_like(self.rows[:, :1]))
        self.visit(alpha, norms)
        if self.done == len(self.layers) - 1:
            self.done += 1
            raise AllSeen

    def checked_rows(self, call: Call, rows: Tensor) -> Tensor:
        """Attention of `rows` `[batch, heads, rows, tokens]`, 0 on padding; notes causality."""
        alpha = attention_rows(call, rows.to(call.query.device)).to(self.seen.device)
        alpha = alpha.masked_fill(~self.seen[:, None, None], 0.0)
        if not self.cross:
            places = torch.arange(alpha.shape[-1], device=alpha.device)
            later = places > rows.to(alpha.device)[:, :, None]
            self.causal &= alpha.amax(1).masked_fill(~later, 0.0).amax() < NONE
        return alpha

    @contextmanager
    def open(self, reader: PreTrainedModel) -> Iterator[None]:
        """While open, the reader's forward pass is watched; then all is as it was, and checked."""
        usual, name = reader.config._attn_implementation, type(reader).__name__
        with ExitStack() as hooks, self:
            for layer in self.layers:
                enter = layer.register_forward_pre_hook(self.enter_layer, with_kwargs=True)
                hooks.callback(enter.remove)
                hooks.callback(layer.register_forward_hook(self.leave_layer).remove)
            if usual != "sdpa":
                AttentionInterface.register(REGISTERED, self.see_eager)
                reader.set_attn_implementation(REGISTERED)
                hooks.callback(reader.set_attn_implementation, usual)
            with suppress(AllSeen):
                yield
        if self.done != len(self.layers):
            raise unfit(name, f"ran {self.done} layers where it has {len(self.layers)}")
        if not self.sound:
            why = "it is broken, or its numbers overflow: then load it in float32 (`dtype`)"
            raise AttentionError(f"{name}'s attention is not a number: {why}.")
        if not self.complete:
            raise unfit(name, "attends to padding, so its scores would be wrong")
        if not self.causal:
            told = f"{name} is not causal: a row has seen later tokens, which it should predict. "
            told += "Use a causal reader; if this one is, its config.json must say so "
            raise AttentionError(f"{told}(is_decoder or is_causal true, nothing bidirectional).")
