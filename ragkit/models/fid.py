"""The encoder-decoder reader, fusion-in-decoder, and the loading of readers of either kind.

Each passage is encoded with the question, the decoder attends to all; passage scores come from its
cross-attention. Source: Izacard and Grave, 'Leveraging Passage Retrieval with Generative Models for
Open Domain Question Answering'.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput

from ragkit.attention import AttentionError, observe_cross, pooled
from ragkit.data.passages import Passage
from ragkit.data.questions import Corpus, Question
from ragkit.errors import ReaderError
from ragkit.models import device
from ragkit.models.loading import loading, readable, refuse_missing
from ragkit.models.reader import PART, Prompt, Reader, embedded_reader
from ragkit.settings import ReaderSettings


@dataclass(frozen=True)
class FidPrompt(Prompt):
    """A prompt whose tokens are those of its blocks, one after another, and then the answer's.

    `blocks` are the blocks' lengths: a block is the question with one passage, and is encoded on
    its own.
    """

    blocks: tuple[int, ...] = ()


class FidReader(Reader):
    """An encoder-decoder with its tokenizer. `settings.context` is the length of one block, not of
    all together.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        settings: ReaderSettings,
        style: str = "question",
    ) -> None:
        super().__init__(model, tokenizer, settings, style)
        if model.config.decoder_start_token_id is None:
            raise ReaderError(
                f"{settings.model}: its config names no decoder_start_token_id, "
                "with which every answer begins. Add it to config.json."
            )
        self.start = int(model.config.decoder_start_token_id)

    def block(
        self, question: Question, passage: Passage | None, number: int
    ) -> list[tuple[str, int]]:
        """The question with one passage (or none) as texts with their owners."""
        asked = question.cloze if self.style == "cloze" else question.text
        parts = [("question: ", PART["other"]), (asked, PART["question"])]
        if passage is not None:
            parts += [(" title: ", PART["other"]), (passage.title, PART["title"])]
            parts += [(" context: ", PART["other"]), (passage.text, number)]
        return parts

    def prompt(
        self, question: Question, passages: Sequence[Passage], answer: str | None = None
    ) -> FidPrompt:
        """The prompt, with the answer and an end token behind it if given.

        A block longer than the context loses tokens at the end of its passage. Raises ReaderError
        if the question alone does not fit.
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
        tail: list[int] = []
        if answer is not None:
            ids_of = self.tokenizer(readable(answer), add_special_tokens=False)
            tail = [*ids_of["input_ids"], self.end]
        return FidPrompt(
            ids + tail, owner + [PART["answer"]] * len(tail), len(ids), trimmed, tuple(lengths)
        )

    def states(self, prompts: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """The encoder's states of each prompt's blocks in a row `[prompts, tokens, size]`, and
        their mask, right-padded.

        Cross-attention knows no places, so the blocks' own padding can be left out.
        """
        blocks: list[Tensor] = []
        for prompt in prompts:
            blocks += torch.tensor(prompt.ids[: prompt.answer_start]).split(list(prompt.blocks))
        ids = pad_sequence(blocks, batch_first=True, padding_value=self.pad)
        mask = pad_sequence([torch.ones_like(block) for block in blocks], batch_first=True)
        place = self.model.device
        encoded = self.model.get_encoder()(input_ids=ids.to(place), attention_mask=mask.to(place))
        each = encoded.last_hidden_state[mask.bool()].split([p.answer_start for p in prompts])
        seen = [one.new_ones(len(one), dtype=torch.long) for one in each]
        return pad_sequence(list(each), True), pad_sequence(seen, True)

    def decoder_ids(self, prompts: Sequence[Prompt]) -> Tensor:
        """What the decoder reads `[prompts, answer]`: the start token and the answer without its
        end, right-padded.
        """
        read = [torch.tensor([self.start, *p.ids[p.answer_start : -1]]) for p in prompts]
        return pad_sequence(read, batch_first=True, padding_value=self.pad).to(self.model.device)

    @torch.no_grad()
    def generated(self, prompts: Sequence[Prompt]) -> list[str]:
        """The answers to one batch of prompts."""
        states, mask = self.states(prompts)
        out = self.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_start_token_id=self.start,
            # its own cache would have the encoder's number of layers
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            generation_config=self.greedy(),
        )
        return [self.text_of(row) for row in out[:, 1:]]

    def token_losses(self, prompts: Sequence[Prompt]) -> Tensor:
        """Negative log-likelihood (nats) of the tokens of each prompt's answer `[prompts, answer
        tokens]`.

        With gradients; NaN behind an answer's end.
        """
        states, mask = self.states(prompts)
        answers = [torch.tensor(p.ids[p.answer_start :]) for p in prompts]
        labels = pad_sequence(answers, batch_first=True, padding_value=-100).to(states.device)
        logits = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=self.decoder_ids(prompts),
            use_cache=False,
        ).logits
        by_class = logits.float().transpose(1, 2)
        loss = nn.functional.cross_entropy(by_class, labels, reduction="none", ignore_index=-100)
        return loss.masked_fill(labels == -100, math.nan)

    def attention(self, prompts: Sequence[Prompt], rows: Tensor, uses: Tensor) -> Tensor:
        """Token contributions `[norm (off, on), layers, groups, prompts, tokens]` from the
        decoder's cross-attention.

        As in `Reader.attention`, `rows` are places in the prompts: the last token before the answer
        is the decoder's start. Answer tokens are no keys: they get 0.
        """
        with torch.no_grad():
            states, mask = self.states(prompts)
        read = self.decoder_ids(prompts)
        places = rows - torch.tensor([[p.answer_start - 1] for p in prompts])
        try:
            tokens = pooled(
                lambda visit: observe_cross(self.model, states, mask, read, places, visit), uses
            )
        except AttentionError as error:
            raise ReaderError(f"{self.settings.model}: {error}") from None
        return nn.functional.pad(tokens, (0, max(len(p.ids) for p in prompts) - tokens.shape[-1]))


def load_reader(
    name: str | Path, settings: ReaderSettings, style: str = "question", to_train: bool = False
) -> Reader:
    """A reader from a folder or hub name, on the run's device and its fused attention path if it
    has one.

    `embedded` is the one that ships. In `settings.dtype`; with float32 weights if it is `to_train`.
    Raises RagkitError if it cannot be loaded.
    """
    path = str(embedded_reader() if name == "embedded" else name)
    revision = {} if Path(path).is_dir() else {"revision": settings.revision}
    dtype = torch.float32 if to_train else getattr(torch, settings.dtype)
    with loading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **revision)
        auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
        model, loaded = auto.from_pretrained(path, dtype=dtype, **options, **revision)
        refuse_missing(path, loaded)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **revision)
        kind = FidReader if config.is_encoder_decoder else Reader
        reader = kind(model.to(device.device()), tokenizer, settings, style)
        with torch.no_grad():  # a padded batch of two: what fails is said before any work
            asked = Question("", "a", ("a",), ())
            reader.losses([reader.prompt(asked, [], answer) for answer in ("a", "a a a")])
    return reader


def reader_folder(step1: Path, which: str) -> Path:
    """Where `make_step1` kept a reader: `fine-tuned`, or one on the way such as `step 100`."""
    return step1 / which.replace(" ", "-")


def fitted(reader: Reader, inputs: Mapping[str, Path]) -> Reader:
    """The reader, its answers as long as the questions for distillation need: see `Reader.fit`."""
    if reader.settings.answer_tokens is None:
        corpus = Corpus.load("", inputs["passages"], inputs["questions"])
        reader.fit(corpus.questions["distill"])
    return reader


def open_reader(inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> Reader:
    """The reader `settings["which"]` of a stage: untaught, or kept by Step 1 if that is there."""
    reader, which = ReaderSettings(**settings["reader"]), settings["which"]
    if "step1" in inputs:
        return fitted(load_reader(reader_folder(inputs["step1"], which), reader), inputs)
    styles = json.loads((inputs["style"] / "style.json").read_text("utf8"))
    return fitted(load_reader(reader.model, reader, styles[which]), inputs)
