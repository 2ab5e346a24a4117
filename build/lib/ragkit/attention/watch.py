"""Listens to a reader's layers while they run, and makes sure that it hears the right attention call of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ragkit.attention.kernels import REGISTERED, AttentionError, Call, attention_rows, listener, value_norms

Visit = Callable[[Tensor, Tensor], None]  # called once a layer with alpha [batch, heads, rows, tokens] and norms [batch, heads, tokens]


class AllSeen(Exception):
    """The last layer's attention was seen: the rest of the forward pass is not needed."""


class Watch(TorchFunctionMode):
    """Listens to the attention calls of a decoder's layers, and makes sure that it is the right one of each layer.

    `seen` `[batch, tokens]` is True on tokens that are not padding, the past in a cache and, in generation, the future
    included; `rows` `[batch, rows]` are query positions, None the last one. `cross`: the second call of each layer.
    """

    def __init__(self, layers: nn.ModuleList, seen: Tensor, rows: Tensor | None, visit: Visit, past: int = 0, cross: bool = False, stop: bool = True) -> None:
        super().__init__()
        self.layers, self.seen, self.rows, self.visit, self.stop = layers, seen, rows, visit, stop
        self.calls_expected = 2 if cross else 1
        self.cross, self.tokens = cross, seen.shape[1] if cross else past
        self.layer, self.calls, self.queries, self.done = -1, 0, 0, 0
        self.inside = False
        self.sound = torch.ones((), dtype=torch.bool, device=seen.device)
        self.complete = self.sound.clone()

    def enter_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer = next(i for i, one in enumerate(self.layers) if one is layer)
        if self.layer != self.done % len(self.layers):
            raise AttentionError(f"Layer {self.layer} ran out of turn: the reader's attention cannot be recorded.")
        self.calls, self.inside = 0, True
        self.queries = (args[0] if args else kwargs["hidden_states"]).shape[1]
        if self.layer == 0 and not self.cross:
            self.tokens += self.queries

    def leave_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.calls != self.calls_expected:
            raise AttentionError(
                f"Layer {self.layer} made {self.calls} attention calls that can be seen, not {self.calls_expected}: the reader's attention cannot be recorded."
            )
        self.inside, self.done = False, self.done + 1

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention and self.inside:
            self.see(fused_call(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def see(self, call: Call) -> None:
        """Takes a layer's attention call; ends the forward pass after the last layer's."""
        self.calls += 1
        if self.calls != self.calls_expected:
            return
        alpha, norms = self.aligned(self.unpacked(call))
        padding = ~self.seen[:, : self.tokens]
        alpha, norms = alpha.masked_fill(padding[:, None, None], 0.0), norms.masked_fill(padding[:, None], 0.0)
        self.sound &= (alpha.isfinite().all() & norms.isfinite().all()).to(self.sound.device)
        self.complete &= ((alpha.sum(-1) - 1).abs() < 1e-3).all().to(self.sound.device)
        self.visit(alpha.to(self.seen.device), norms.to(self.seen.device))
        if self.stop and self.layer == len(self.layers) - 1:
            self.done += 1
            raise AllSeen

    def unpacked(self, call: Call) -> Call:
        """The call with one query a head: transformers hands a single query's heads over as queries of their key head."""
        batch, _, queries, size = call.query.shape
        if queries == self.queries:
            return call
        if self.queries != 1:
            raise AttentionError(f"Layer {self.layer} computes attention for {queries} queries, its input has {self.queries}: it cannot be recorded.")
        mask = call.mask.reshape(batch, -1, 1, call.mask.shape[-1]) if isinstance(call.mask, Tensor) and call.mask.shape[1] > 1 else call.mask
        return Call(call.query.reshape(batch, -1, 1, size), call.key, call.value, mask, call.is_causal, call.scale, call.softcap)

    def aligned(self, call: Call) -> tuple[Tensor, Tensor]:
        """Rows and value norms over all tokens; a sliding-window layer's cache holds the last of them only."""
        rows = self.rows if self.rows is not None else torch.full((self.seen.shape[0], 1), self.queries - 1)
        missing = self.tokens - call.key.shape[2]
        if missing < 0 or (missing > 0 and (self.cross or self.tokens == self.queries)):
            raise AttentionError(f"Layer {self.layer} has {call.key.shape[2]} keys for {self.tokens} tokens: its attention cannot be recorded.")
        alpha, norms = attention_rows(call, rows.to(call.query.device)), value_norms(call)
        return nn.functional.pad(alpha, (missing, 0)), nn.functional.pad(norms, (missing, 0))

    @contextmanager
    def open(self, reader: PreTrainedModel) -> Iterator[None]:
        """While open, the reader's forward pass is watched; afterwards everything is as it was. Checks what was seen."""
        usual = reader.config._attn_implementation
        token = listener.set(self.see)
        try:
            with ExitStack() as hooks, self:
                for layer in self.layers:
                    hooks.callback(layer.register_forward_pre_hook(self.enter_layer, with_kwargs=True).remove)
                    hooks.callback(layer.register_forward_hook(self.leave_layer).remove)
                if usual != "sdpa":
                    reader.set_attn_implementation(REGISTERED)
                    hooks.callback(reader.set_attn_implementation, usual)
                with suppress(AllSeen):
                    yield
        finally:
            listener.reset(token)
        if self.done == 0 or self.done % len(self.layers):
            raise AttentionError(f"{self.done} layers were seen, the model has {len(self.layers)}: its attention cannot be recorded.")
        if not self.sound:
            raise AttentionError("Attention is not a number. The reader is broken, or overflows in its dtype: load it in float32.")
        if not self.complete:
            raise AttentionError("Attention falls on padding: the reader does not heed its attention mask, so its scores would be wrong.")


def fused_call(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Call:  # fmt: skip
    """The arguments of `scaled_dot_product_attention`, in the dtype in which the kernel gets them under autocast."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    return Call(query, key, value, attn_mask, is_causal, scale)
