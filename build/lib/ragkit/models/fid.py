"""The encoder-decoder reader, fusion-in-decoder: each passage is encoded with the question, the decoder attends to all.

Source: Izacard and Grave, 'Leveraging Passage Retrieval with Generative Models for Open Domain Question Answering'.
Its passage scores come from the decoder's cross-attention. It is used like any `ragkit.reader.Reader`.
"""

from __future__ import annotations

from ragkit.errors import ReaderError

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from ragkit.models import device as fleet
from ragkit.attention.record import observe_cross, pooled
from ragkit.data.questions import Question
from ragkit.data.passages import Passage
from ragkit.profile import ReaderSettings
from ragkit.models.reader import PART, Prompt, Reader


@dataclass(frozen=True)
class FidPrompt(Prompt):
    """A prompt whose tokens are those of its blocks, one after another, and then the answer's.

    `blocks` are the blocks' lengths: a block is the question with one passage, and is encoded on its own.
    """

    blocks: tuple[int, ...] = ()


class FidReader(Reader):
    """An encoder-decoder with its tokenizer. `settings.context` is the length of one block, not of all together."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ReaderSettings, style: str = "question") -> None:
        super().__init__(model, tokenizer, settings, style)
        if model.config.decoder_start_token_id is None:
            raise ReaderError(f"{settings.model}: its config names no decoder_start_token_id, with which every answer begins. Add it to config.json.")
        self.start = int(model.config.decoder_start_token_id)

    def block(self, question: Question, passage: Passage | None, number: int) -> list[tuple[str, int]]:
        """The question with one passage (or none) as texts with their owners."""
        asked = question.cloze if self.style == "cloze" else question.text
        parts = [("question: ", PART["other"]), (asked, PART["question"])]
        if passage is not None:
            parts += [(" title: ", PART["other"]), (passage.title, PART["title"]), (" context: ", PART["other"]), (passage.text, number)]
        return parts

    def prompt(self, question: Question, passages: list[Passage], answer: str | None = None) -> FidPrompt:
        """The prompt, with the answer and an end token behind it if given.

        A block longer than the context loses tokens at the end of its passage. Raises ReaderError if the question alone
        does not fit.
        """
        ids: list[int] = []
        owner: list[int] = []
        lengths, trimmed = [], 0
        for number, passage in enumerate(passages or [None]):
            block, who = self.tokens(self.block(question, passage, number))
            excess = max(0, len(block) - self.settings.context)
            if excess:
                block, who = self.trim(block, who, excess, len(passages))
            ids, owner, trimmed = ids + block, owner + who, trimmed + excess
            lengths.append(len(block))
        tail = [] if answer is None else [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], self.end]
        return FidPrompt(ids + tail, owner + [PART["answer"]] * len(tail), len(ids), trimmed, tuple(lengths))

    def states(self, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        """The encoder's states of each prompt's blocks in a row `[prompts, tokens, size]`, and their mask, right-padded.

        Cross-attention knows no places, so the blocks' own padding can be left out.
        """
        blocks = [block for p in prompts for block in torch.tensor(p.ids[: p.answer_start]).split(list(p.blocks))]  # type: ignore[attr-defined]
        ids = pad_sequence(blocks, batch_first=True, padding_value=self.pad)
        mask = pad_sequence([torch.ones_like(block) for block in blocks], batch_first=True)
        fleet.done["tokens"] += sum(map(len, blocks))
        encoder = self.model.get_encoder()
        flat = encoder(input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device)).last_hidden_state[mask.bool()]
        each = flat.split([p.answer_start for p in prompts])
        return pad_sequence(list(each), batch_first=True), pad_sequence([flat.new_ones(len(one), dtype=torch.long) for one in each], batch_first=True)

    def decoder_ids(self, prompts: list[Prompt]) -> Tensor:
        """What the decoder reads `[prompts, answer]`: the start token and the answer without its end, right-padded."""
        read = [torch.tensor([self.start, *p.ids[p.answer_start : -1]]) for p in prompts]
        return pad_sequence(read, batch_first=True, padding_value=self.pad).to(self.model.device)

    @torch.no_grad()
    def generated(self, prompts: list[Prompt]) -> list[str]:
        """The answers to one batch of prompts."""
        states, mask = self.states(prompts)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())  # its own would have the encoder's number of layers
        out = self.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=states), attention_mask=mask, decoder_start_token_id=self.start, past_key_values=cache,
            max_new_tokens=self.settings.answer_tokens, do_sample=False, num_beams=1, pad_token_id=self.pad, eos_token_id=self.end,
        )  # fmt: skip
        return [self.text_of(row) for row in out[:, 1:]]

    def token_losses(self, prompts: list[Prompt]) -> Tensor:
        """Negative log-likelihood (nats) of the tokens of each prompt's answer `[prompts, answer tokens]`, with gradients; NaN behind its end."""
        states, mask = self.states(prompts)
        labels = pad_sequence([torch.tensor(p.ids[p.answer_start :]) for p in prompts], batch_first=True, padding_value=-100).to(states.device)
        outputs = BaseModelOutput(last_hidden_state=states)
        logits = self.model(encoder_outputs=outputs, attention_mask=mask, decoder_input_ids=self.decoder_ids(prompts), use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return loss.masked_fill(labels == -100, math.nan)

    def attention(self, prompts: list[Prompt], rows: Tensor, uses: Tensor) -> Tensor:
        """Token contributions `[norm (off, on), layers, groups, prompts, tokens]` from the decoder's cross-attention.

        As in `Reader.attention`, `rows` are places in the prompts: the last token before the answer is the decoder's
        start. Answer tokens are no keys: they get 0.
        """
        with torch.no_grad():
            states, mask = self.states(prompts)
        places = rows - torch.tensor([[p.answer_start - 1] for p in prompts])
        tokens = pooled(lambda visit: observe_cross(self.model, states, mask, self.decoder_ids(prompts), places, visit), uses)
        return nn.functional.pad(tokens, (0, max(len(p.ids) for p in prompts) - tokens.shape[-1]))
