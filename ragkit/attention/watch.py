"""Listens to a reader's layers while they run, and makes sure it hears the right call of each."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from . import kernels
from .kernels import AttentionError, Call, unfit

# Called once a layer with alpha [batch, heads, rows, tokens] and norms [batch, heads, tokens].
Visit = Callable[[Tensor, Tensor], None]
NONE = 1e-6  # attention that is none: an additive mask may leave a trace of what it hides


class AllSeen(Exception):
    """The last layer's attention was seen: the rest of the forward pass is not needed."""


class Watch(TorchFunctionMode):
    """Listens to the attention calls of a decoder's layers, and checks what it hears.

    `seen` `[batch, tokens]` is True on tokens that are not padding; `rows` `[batch, rows]` are
    query positions. `cross`: the second call of each layer is meant, not the first.
    """

    def __init__(
        self, layers: nn.ModuleList, seen: Tensor, rows: Tensor, visit: Visit, cross: bool = False
    ) -> None:
        super().__init__()
        self.layers, self.seen, self.rows, self.visit, self.cross = layers, seen, rows, visit, cross
        self.place, self.calls, self.queries, self.done, self.inside = "", 0, 0, 0, False
        self.sound = torch.ones((), dtype=torch.bool, device=seen.device)
        self.complete, self.causal = self.sound.clone(), self.sound.clone()

    def enter_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a layer: it must be the next one; how many queries it gets."""
        self.place = f"Layer {self.done}"
        if layer is not self.layers[self.done]:
            raise unfit(self.place, "ran out of turn")
        self.calls, self.inside = 0, True
        self.queries = (args[0] if args else kwargs["hidden_states"]).shape[1]

    def leave_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a layer: its attention must have been seen."""
        if self.calls != 1 + self.cross:
            raise unfit(self.place, f"made {self.calls} attention calls, not {1 + self.cross}")
        self.inside, self.done = False, self.done + 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention and self.inside:
            self.see(kernels.fused_call(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def see(self, call: Call) -> None:
        """Takes a layer's attention call; ends the forward pass after the last layer's."""
        self.calls += 1
        if self.calls != 1 + self.cross:
            return
        call, keys, tokens = self.unpacked(call), call.key.shape[2], self.seen.shape[1]
        if keys != tokens:
            raise unfit(self.place, f"has {keys} keys for {tokens} tokens")
        alpha = self.checked_rows(call, self.rows)
        norms = kernels.value_norms(call).to(alpha.device).masked_fill(~self.seen[:, None], 0.0)
        self.sound &= alpha.isfinite().all() & norms.isfinite().all()
        self.complete &= ((alpha.sum(-1) - 1).abs() < 1e-3).all()
        if not self.cross:
            # The rows asked for may be the last, before which everything lies: the first one tells.
            self.checked_rows(call, self.seen.int().argmax(1, keepdim=True))
        self.visit(alpha, norms)
        if self.done == len(self.layers) - 1:
            self.done += 1
            raise AllSeen

    def unpacked(self, call: Call) -> Call:
        """The call with one query a head: transformers packs a lone query's by their key head."""
        batch, _, queries, size = call.query.shape
        if queries == self.queries:
            return call
        if self.queries != 1:
            raise unfit(self.place, f"attends from {queries} queries, its input has {self.queries}")
        mask = call.mask
        if isinstance(mask, Tensor) and mask.shape[1] > 1:
            mask = mask.reshape(batch, -1, 1, mask.shape[-1])
        return replace(call, query=call.query.reshape(batch, -1, 1, size), mask=mask)

    def checked_rows(self, call: Call, rows: Tensor) -> Tensor:
        """Attention of `rows` `[batch, heads, rows, tokens]`, 0 on padding; notes causality."""
        alpha = kernels.attention_rows(call, rows.to(call.query.device)).to(self.seen.device)
        alpha = alpha.masked_fill(~self.seen[:, None, None], 0.0)
        if not self.cross:
            places = torch.arange(alpha.shape[-1], device=alpha.device)
            later = places > rows.to(alpha.device)[:, :, None]
            self.causal &= alpha.amax(1).masked_fill(~later, 0.0).amax() < NONE
        return alpha

    @contextmanager
    def open(self, reader: PreTrainedModel) -> Iterator[None]:
        """While open, the reader's forward pass is watched; then all is as it was, and checked."""
        usual, token = reader.config._attn_implementation, kernels.listener.set(self.see)
        try:
            with ExitStack() as hooks, self:
                for layer in self.layers:
                    enter = layer.register_forward_pre_hook(self.enter_layer, with_kwargs=True)
                    hooks.callback(enter.remove)
                    hooks.callback(layer.register_forward_hook(self.leave_layer).remove)
                if usual != "sdpa":
                    reader.set_attn_implementation(kernels.REGISTERED)
                    hooks.callback(reader.set_attn_implementation, usual)
                with suppress(AllSeen):
                    yield
        finally:
            kernels.listener.reset(token)
        if self.done != len(self.layers):
            raise unfit(reader, f"ran {self.done} layers where it has {len(self.layers)}")
        if not self.sound:
            raise AttentionError(
                f"{type(reader).__name__}'s attention is not a number. It is broken, or its "
                "numbers overflow: then load it in float32 (`dtype`, in config.json or profile)."
            )
        if not self.complete:
            raise unfit(reader, "attends to padding, so its scores would be wrong")
        if not self.causal:
            raise AttentionError(
                f"{type(reader).__name__} is not causal: a row has seen later tokens, which it "
                "should predict. Use a causal reader; if this one is, its config.json must say so "
                "(is_decoder or is_causal true, no bidirectional attention)."
            )
