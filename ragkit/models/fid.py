"""The encoder-decoder reader, fusion-in-decoder, and the loading of readers of either kind. Each
passage is encoded with the question, the decoder attends to all; passage scores come from its
cross-attention. Source: Izacard and Grave (2021), 'Leveraging Passage Retrieval' (FiD)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from ragkit.attention.record import observe_cross
from ragkit.data.corpus import Asked, Corpus, Passage, Question
from ragkit.data.text import readable
from ragkit.models import device, gguf
from ragkit.models.reader import CLOZE, PART, Prompt, Reader
from ragkit.settings import EMBEDDED, ReaderSettings


class FidReader(Reader):
    """An encoder-decoder with its tokenizer. A prompt has a block a passage, with the question;
    `settings.context` is the length of one block, not of all together."""

    def prompt(
        self, question: Question, passages: Sequence[Passage], answer: str | None = None
    ) -> Prompt:
        """As of `Reader`; a block longer than the context loses tokens at its passage's end."""
        asked = question.cloze if self.style == "cloze" else question.text
        other, blocks = PART["other"], []
        for number, passage in enumerate(passages or [None]):
            parts = [("question: ", other), (asked, PART["question"])]
            if passage is not None:
                parts += [(" title: ", other), (passage.title, PART["title"])]
                parts += [(" context: ", other), (passage.text, number)]
            blocks.append(self.tokens(parts))
        told = self.tokenizer(readable(answer or ""), add_special_tokens=False)["input_ids"]
        tail = [] if answer is None else [*told, self.end]
        return self.joined(blocks, self.settings.context, tail)

    def encoded(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """As arguments of the model: the encoder's states of each prompt's blocks `[prompts,
        tokens, size]`, right-padded, without the blocks' own padding, and their mask."""
        blocks, place = list[Tensor](), self.model.device
        for prompt in prompts:
            blocks += torch.tensor(prompt.ids[: prompt.answer_start]).split(prompt.blocks)
        ids = pad_sequence(blocks, True, self.pad).to(place)
        mask = pad_sequence([torch.ones_like(block) for block in blocks], True).to(place)
        states = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        each = states[mask.bool()].split([p.answer_start for p in prompts])
        seen = pad_sequence([one.new_ones(len(one), dtype=torch.long) for one in each], True)
        outputs = BaseModelOutput(pad_sequence(list(each), True))
        return {"encoder_outputs": outputs, "attention_mask": seen}

    def read(self, prompts: Sequence[Prompt]) -> Tensor:
        """What the decoder reads `[prompts, answer]`: start, answer and its end."""
        read = [torch.tensor([self.start, *p.ids[p.answer_start :]]) for p in prompts]
        return pad_sequence(read, True, self.pad).to(self.model.device)

    @torch.no_grad()
    def generated(self, prompts: Sequence[Prompt]) -> list[str]:
        """The answers to one batch of prompts."""
        caches = transformers.DynamicCache(), transformers.DynamicCache()
        given = {"max_new_tokens": self.answer_tokens, **self.encoded(prompts)}
        # its own cache would have the encoder's number of layers
        given["past_key_values"] = transformers.EncoderDecoderCache(*caches)
        return [self.text_of(row) for row in self.model.generate(**given)[:, 1:]]

    def predicted(self, prompts: Sequence[Prompt]) -> Tensor:
        """Logits of all answers' tokens, one prompt after another `[tokens, vocabulary]`."""
        given = {"decoder_input_ids": self.read(prompts), "use_cache": False}
        logits = self.model(**self.encoded(prompts), **given).logits
        rows = zip(logits, prompts, strict=True)
        return torch.cat([row[: len(p) - p.answer_start] for row, p in rows])

    @torch.no_grad()
    def watched(self, prompts: Sequence[Prompt], rows: Tensor) -> Callable[..., None]:
        """As of `Reader`, with the decoder's cross-attention: the last token before the answer is
        the decoder's start, and answer tokens are no keys: they get 0."""
        places = rows - torch.tensor([[p.answer_start - 1] for p in prompts])
        states, mask = self.encoded(prompts).values()
        read = (states.last_hidden_state, mask, self.read(prompts))
        return partial(observe_cross, self.model, *read, places)


def located(name: str | Path, revision: str = "main") -> tuple[str, dict[str, Any]]:
    """Where `from_pretrained` finds a reader: a folder or hub name, and what it is told with it."""
    place = str(EMBEDDED.get(str(name), name))
    given: dict[str, Any] = {"trust_remote_code": False}
    if (path := Path(place)).is_file():
        return str(path.parent), given | {"gguf_file": path.name}
    return place, given if path.is_dir() else given | {"revision": revision}


def load_reader(name: str | Path, settings: ReaderSettings, to_train: bool = False) -> Reader:
    """A reader from a folder, GGUF file or hub name, or one of EMBEDDED, on the run's device, in
    `settings.dtype` (float32 if it is `to_train`). Raises RagkitError if it cannot be loaded."""
    path, given = located(name, settings.revision)
    dtype = torch.float32 if to_train else getattr(torch, settings.dtype)
    weights = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    with device.loading(str(EMBEDDED.get(str(name), name))):
        config = transformers.AutoConfig.from_pretrained(path, **given)
        kind, head = (FidReader, "Seq2SeqLM") if config.is_encoder_decoder else (Reader, "CausalLM")
        auto: Any = getattr(transformers, f"AutoModelFor{head}")
        if "gguf_file" in given:
            unpacked = transformers.GgufConfig(dequantize=True)
            weights |= {"config": config, "quantization_config": unpacked}
        model, loaded = auto.from_pretrained(path, **weights, **given)
        device.refuse_missing(str(name), loaded)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, **given)
        if "gguf_file" in given:
            gguf.check(Path(name), model, tokenizer)
        reader = kind(model.to(device.device()), tokenizer, settings)
        with torch.no_grad():  # a padded batch of two: what fails is said before any work
            asked = Question("", "a", ("a",), ())
            reader.losses([reader.prompt(asked, [], answer) for answer in ("a", "a a a")])
    return reader


def open_reader(
    inputs: Mapping[str, Path], settings: Mapping[str, Any], to_train: bool = False
) -> Reader:
    """The reader `settings["which"]` of a stage: kept by `step1`, if that is among the inputs, else
    untaught; asked by clozes where its name ends so. Answers are as long as distillation's."""
    chosen, which = ReaderSettings(**settings["reader"]), settings.get("which", "")
    trained = which.removesuffix(CLOZE)
    kept = inputs["step1"] / trained.replace(" ", "-") if "step1" in inputs else chosen.model
    reader = load_reader(kept, chosen, to_train)
    reader.style = "question" if which == trained else "cloze"
    reader.fit(Corpus.load("", inputs["passages"], inputs["questions"]).questions["distill"])
    return reader


def opened(inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> tuple[Asked, Reader]:
    """The questions of a stage's part with the passages found for them, and its reader."""
    asked = Asked.open(inputs, settings["part"], settings["questions"], settings["k"])
    return asked.scored(settings["reader"]), open_reader(inputs, settings)
