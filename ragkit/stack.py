"""What a large model costs here, measured on a small one: its first layers, with random weights, at its real width, device and precision.

A transformer's layers all cost the same, so a few of them stand for all; a vocabulary of 1,000 stands for the real one, which is only looked up.
"""

from __future__ import annotations

import copy
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import AutoModel

from ragkit.memory import Lengths
from ragkit.profile import Profile
from ragkit.sizes import Shape

LAYERS = 2
VOCABULARY = 1000
LONG = 2.0  # seconds: a measurement that would take longer is made on fewer tokens and scaled up
PROBE = 128  # tokens of the first look
CHECKPOINTED = 4 / 3  # a training step with gradient checkpointing runs forward twice: 4 passes' work in place of 3


def on_processor() -> float:
    """Seconds that the processor has given to this process and to those it began and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that some work takes.

    On a processor with one thread it is the time that the processor gave to it: what else the machine does is not counted. Otherwise it is the
    time that went by.
    """
    started, had = time.perf_counter(), on_processor()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    passed, given = time.perf_counter() - started, on_processor() - had
    return min(passed, given) if torch.get_num_threads() == 1 and not torch.cuda.is_available() else passed


def fastest(work: Callable[[], Any], repeats: int = 3, enough: float = 6.0) -> float:
    """Seconds of the fastest of some repetitions; fewer of them once `enough` seconds have passed."""
    took: list[float] = []
    while len(took) < repeats and sum(took) < enough:
        took.append(seconds(work))
    return min(took)


class Stack:
    """The first layers of a model. `mixed`: float32 weights that are computed with in another precision, as in training."""

    def __init__(self, config: Any, shape: Shape, device: str, dtype: str, mixed: bool) -> None:
        changed = copy.deepcopy(config)
        text = changed.get_text_config(decoder=True)
        text.num_hidden_layers, text.vocab_size, text.pad_token_id = LAYERS, VOCABULARY, 0
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:LAYERS]
        self.shape, self.device, self.dtype, self.mixed = shape, device, getattr(torch, dtype), mixed
        torch.manual_seed(0)
        self.model: Any = AutoModel.from_config(changed).to(device, torch.float32 if mixed else self.dtype)
        self.seen: dict[tuple[str, int], float] = {}

    def computing(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, self.dtype, enabled=self.mixed and self.dtype != torch.float32)

    def inputs(self, texts: int, tokens: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, VOCABULARY, (texts, tokens), device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def forward(self, texts: int, tokens: int) -> None:
        """One pass without gradients."""
        self.model.eval()
        with torch.no_grad(), self.computing():
            self.model(**self.inputs(texts, tokens))

    def backward(self, texts: int, tokens: int) -> None:
        """One pass with gradients."""
        self.model.train()
        with self.computing():
            out = self.model(**self.inputs(texts, tokens)).last_hidden_state
        out.float().mean().backward()
        self.model.zero_grad()

    def a_text(self, tokens: float, most: int, backward: bool = False) -> float:
        """Seconds of one text of so many tokens in the whole model, in batches of at most `most`."""
        wanted = max(8, round(tokens / 32) * 32)
        kind = "backward" if backward else "forward"
        if (kind, wanted) not in self.seen:
            work = self.backward if backward else self.forward
            work(1, min(PROBE, wanted))
            probe = fastest(lambda: work(1, min(PROBE, wanted)), 2) / min(PROBE, wanted)
            length = min(wanted, max(PROBE, int(LONG / probe)))
            texts = max(1, min(most, int(LONG / 2 / (probe * length))))
            self.seen[kind, wanted] = fastest(lambda: work(texts, length), 3) / texts / length
        return self.seen[kind, wanted] * tokens * self.shape.layers / LAYERS

    def a_token_more(self, texts: int, tokens: float) -> float:
        """Seconds of one generated token of one text in the whole model, with a cache of those before it.

        Generation reads every weight for each token, so the layers stand for the whole by their weights.
        """
        from transformers import DynamicCache

        self.model.eval()
        given = self.inputs(min(texts, 8), min(int(tokens), 512))
        ids = given["input_ids"]
        with torch.no_grad(), self.computing():
            cache = DynamicCache(config=self.model.config)
            self.model(**given, past_key_values=cache, use_cache=True)
            took = fastest(lambda: self.model(input_ids=ids[:, :1], past_key_values=copy.deepcopy(cache), use_cache=True))
        return took / len(ids) * self.shape.parameters / sum(p.numel() for p in self.model.parameters())

    def a_weight_trained(self) -> float:
        """Seconds of an AdamW step for one weight."""
        weights = list(self.model.parameters())
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer = torch.optim.AdamW(weights)
        optimizer.step()
        took = fastest(optimizer.step)
        self.model.zero_grad()
        return took / sum(p.numel() for p in weights)


def reader_costs(profile: Profile, lengths: Lengths, forward: Stack, training: Stack, a_token_cut: float) -> dict[str, float]:
    """Seconds of a unit of every kind of work that a reader does; `a_token_cut` is what cutting texts into tokens takes, a token."""
    settings, k = profile.reader, profile.k

    def scored(passages: int, most: int) -> float:
        tokens = lengths.prompt(passages)
        return forward.a_text(tokens, most) + a_token_cut * tokens

    def answered(passages: int) -> float:
        tokens, most = lengths.prompt(passages), 2 * settings.at_once
        return scored(passages, most) + settings.answer_tokens * forward.a_token_more(most, tokens)

    tokens = lengths.prompt(k)
    a_prompt = training.a_text(tokens, settings.at_once, backward=True) * (CHECKPOINTED if settings.gradient_checkpointing else 1) + a_token_cut * tokens
    weights = settings.lora_rank * forward.shape.adapter_weights if settings.lora_rank else forward.shape.parameters
    recorded = scored(k, settings.at_once)
    return {
        "Step 1 steps": settings.batch * a_prompt + weights * training.a_weight_trained(),
        "prompts recorded": recorded,
        "questions looked at": recorded + k * scored(1, 4 * settings.at_once),
        "passages left out": scored(k - 1, settings.at_once),
        "prompts read one by one": scored(k, 1),
        "answers": answered(k),
        "closed-book answers": answered(0),
    }


def retriever_costs(profile: Profile, lengths: Lengths, encoding: Stack, a_token_cut: float) -> dict[str, float]:
    """The same for a retriever; its tokens are cut while it computes."""
    settings, distill = profile.retriever, profile.distill

    def encoded(tokens: float) -> float:
        return max(encoding.a_text(tokens, settings.at_once), a_token_cut * tokens)

    asked = lengths.question + 2
    a_step = encoding.shape.parameters * encoding.a_weight_trained() + distill.batch * encoding.a_text(asked, distill.batch, backward=True)
    passages = distill.batch * profile.k * encoding.a_text(lengths.encoded(), distill.batch, backward=True)
    return {
        "passages encoded": encoded(lengths.encoded()),
        "questions encoded": encoded(asked),
        "Step 2 steps": a_step,
        "Step 2 steps, both sides": a_step + passages,
    }
