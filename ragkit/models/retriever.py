"""The bi-encoder: pooled BERT-class vectors and their dot product, as in Contriever."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    AutoModel,
    AutoTokenizer,
    BatchEncoding,
    BertConfig,
    BertModel,
    PreTrainedTokenizerBase,
)

from ragkit.data.passages import Passage, Passages
from ragkit.data.prose import open_prose
from ragkit.data.questions import PASSAGES
from ragkit.data.vocabulary import build_tokenizer
from ragkit.errors import RetrieverError
from ragkit.models import device
from ragkit.models.loading import loading
from ragkit.settings import RetrieverSettings

HIDDEN, LAYERS, HEADS = 128, 2, 4  # of the embedded retriever
CROP_TEMPERATURE = 0.1
KEEP_TITLE = 0.5
CHUNK = 8  # batches that are cut into tokens together


class Retriever(nn.Module):
    """Encodes questions and passages with one model; a passage is read as `title text`."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: RetrieverSettings
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.settings = model, tokenizer, settings

    def tokens(self, texts: Sequence[str]) -> BatchEncoding:
        """The texts as ids and mask `[texts, tokens]`, cut at `passage_tokens`."""
        cut = self.tokenizer(list(texts), truncation=True, max_length=self.settings.passage_tokens)
        return self.padded(cut["input_ids"])

    def padded(self, rows: Sequence[Sequence[int]]) -> BatchEncoding:
        """Token lists as ids and mask `[texts, tokens]`."""
        ids = [torch.tensor(row) for row in rows]
        pad = self.tokenizer.pad_token_id
        return BatchEncoding(
            {
                "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
            }
        )

    def forward(self, texts: Sequence[str] | BatchEncoding) -> Tensor:
        """Vectors `[texts, dimensions]` of texts or their tokens, with gradients."""
        batch = texts if isinstance(texts, BatchEncoding) else self.tokens(texts)
        batch = batch.to(device.device())
        states = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None].to(states.dtype)
        if self.settings.pooling == "cls":
            pooled = states[:, 0]
        else:
            pooled = (states * mask).sum(1) / mask.sum(1)
        plain = self.settings.normalise is False
        return pooled if plain else nn.functional.normalize(pooled, dim=-1)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors `[texts, dimensions]` in the order given; the processes share the texts, and each
        gets all vectors.

        Encoded in batches of like length in tokens, so that little is padded: texts of one length
        in letters differ by a quarter in tokens.
        """
        self.eval()
        settings, kind = self.settings, device.device().type

        def prepare(places: list[int]) -> list[tuple[list[int], BatchEncoding]]:
            chosen = [texts[place] for place in places]
            rows = self.tokenizer(chosen, truncation=True, max_length=settings.passage_tokens)
            ids = rows["input_ids"]
            return [
                ([places[i] for i in batch], self.padded([ids[i] for i in batch]))
                for batch in device.by_length([len(row) for row in ids], settings.at_once)
            ]

        def work(
            batches: list[tuple[list[int], BatchEncoding]],
        ) -> list[tuple[list[int], NDArray[np.float32]]]:
            lower = settings.dtype != "float32"
            with torch.autocast(kind, getattr(torch, settings.dtype), enabled=lower):
                return [(places, self(tokens).float().cpu().numpy()) for places, tokens in batches]

        chunks = device.by_length([len(text) for text in texts], CHUNK * settings.at_once)
        made = device.spread(chunks, prepare, work, "encode")
        vectors = np.empty((len(texts), made[0][0][1].shape[1]), dtype=np.float32)
        for parts in made:
            for places, part in parts:
                vectors[places] = part
        return vectors

    def save(self, folder: Path) -> None:
        """Writes model and tokenizer in Hugging Face's format."""
        if device.is_main():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, name: str | Path, settings: RetrieverSettings) -> Retriever:
        """From a folder or a hub name (safetensors only, no remote code), in float32, on the run's
        device.
        """
        revision = {} if Path(name).is_dir() else {"revision": settings.revision}
        with loading(str(name)):
            model = AutoModel.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, **revision
            ).to(device.device())
            tokenizer = AutoTokenizer.from_pretrained(name, **revision)
        limit = getattr(model.config, "max_position_embeddings", settings.passage_tokens)
        if settings.passage_tokens > limit:
            raise RetrieverError(
                f"{name} has {limit} positions. "
                f"Lower retriever.passage_tokens from {settings.passage_tokens} to that or less."
            )
        return cls(model, tokenizer, settings)


def crop(passage: Passage, rng: random.Random) -> str:
    """A random span of 20 to 60 percent of the words, with the title before it half the time."""
    words = passage.text.split()
    length = max(2, round(len(words) * rng.uniform(0.2, 0.6)))
    start = rng.randint(0, max(0, len(words) - length))
    title = [passage.title] if passage.title and rng.random() < KEEP_TITLE else []
    return " ".join(title + words[start : start + length])


def train_by_cropping(
    passages: Sequence[Passage], settings: RetrieverSettings, seed: int
) -> Retriever:
    """The initial retriever: two random crops of one passage attract, those of other passages
    repel.

    Contriever's recipe without labels (Izacard et al. 2022), with in-batch negatives.
    """
    rng = random.Random(f"crops {seed}")
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=2 * HIDDEN,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=settings.passage_tokens,
    )
    model = BertModel(config, add_pooling_layer=False)
    retriever = Retriever(model, tokenizer, settings).to(device.device())
    optimizer = torch.optim.AdamW(retriever.parameters(), lr=settings.crop_rate)
    retriever.train()
    for _ in tqdm(range(settings.crop_steps), desc="crops", leave=False):
        chosen = rng.sample(passages, min(settings.crop_batch, len(passages)))
        crops = retriever([crop(p, rng) for p in chosen + chosen])
        vectors = nn.functional.normalize(crops, dim=-1)
        logits = vectors[: len(chosen)] @ vectors[len(chosen) :].T / CROP_TEMPERATURE
        loss = nn.functional.cross_entropy(logits, torch.arange(len(chosen), device=logits.device))
        if not torch.isfinite(loss):
            raise RetrieverError("The retriever's loss is not a number. Lower retriever.crop_rate.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return retriever.eval()


def make_retriever(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The initial retriever, in `folder/model`.

    The embedded one is trained on the passages and, in a world, on as much prose that holds the
    words of questions: a word it never met would be noise in every vector, from which one
    pretrained on the web is free.
    """
    chosen, seed, world = (
        RetrieverSettings(**settings["retriever"]),
        settings["seed"],
        settings["world"],
    )
    if chosen.model == "embedded":
        passages = list(Passages(inputs["passages"] / PASSAGES))
        if world is not None:
            prose = open_prose(world, len(passages), random.Random(f"prose {seed}"))
            passages += [Passage("", "", sentence) for sentence in prose]
        retriever = train_by_cropping(passages, chosen, seed)
    else:
        retriever = Retriever.load(chosen.model, chosen)
    retriever.save(folder / "model")
