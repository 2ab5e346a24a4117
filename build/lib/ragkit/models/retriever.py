"""The bi-encoder: pooled BERT-class vectors and their dot product, as in Contriever."""

from __future__ import annotations

from ragkit.errors import RagkitError, RetrieverError

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, BatchEncoding, BertConfig, BertModel, PreTrainedTokenizerBase
from ragkit.models import device as fleet
from ragkit.data.passages import Passage
from ragkit.profile import RetrieverSettings
from ragkit.data.vocabulary import build_tokenizer

EMBEDDED_HIDDEN, EMBEDDED_LAYERS = 128, 2
CROP_TEMPERATURE = 0.1
KEEP_TITLE = 0.5
CHUNK = 8  # batches that are cut into tokens together



@contextmanager
def loading(name: str) -> Iterator[None]:
    """A clear word on a model that cannot be loaded, in place of the libraries' own; no bar for every load."""
    transformers.logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if "gated" in str(error).lower():
            why = "it is gated: accept its terms on its page at the hub and log in (`hf auth login`), or give a local folder in the profile"
        elif Path(name).is_dir():
            why = "its folder does not hold a whole model with safetensors weights and a tokenizer. Save or fetch it again"
        else:
            why = "it is no folder here, and the hub did not give it (no network, a wrong name, or a gated model). Give a local folder in the profile"
        raise RagkitError(f"Model {name!r} cannot be loaded: {why}. ({str(error).splitlines()[0]})") from None


class Retriever(nn.Module):
    """Encodes questions and passages with one model; a passage is read as `title text`."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: RetrieverSettings) -> None:
        super().__init__()
        self.model, self.tokenizer, self.settings = model, tokenizer, settings

    def tokens(self, texts: Sequence[str]) -> BatchEncoding:
        """The texts as ids and mask `[texts, tokens]`, cut at `passage_tokens`."""
        return self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.settings.passage_tokens, return_tensors="pt")

    def forward(self, texts: Sequence[str] | BatchEncoding) -> Tensor:
        """Vectors `[texts, dimensions]` of texts or their tokens, with gradients."""
        batch = texts if isinstance(texts, BatchEncoding) else self.tokens(texts)
        fleet.done["tokens"] += int(batch["attention_mask"].sum())
        batch = batch.to(fleet.device())
        states = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"][:, :, None].to(states.dtype)
        pooled = states[:, 0] if self.settings.pooling == "cls" else (states * mask).sum(1) / mask.sum(1)
        return nn.functional.normalize(pooled, dim=-1) if self.settings.normalise else pooled

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors `[texts, dimensions]` in the order given; encoded in batches of like length in tokens, so that little is padded.

        The processes of a run share the texts, and each gets all vectors.
        """
        self.eval()
        chunks = fleet.by_length([len(text) for text in texts], CHUNK * self.settings.at_once)

        def vectors_of(batches: list[tuple[list[int], BatchEncoding]]) -> list[tuple[list[int], NDArray[np.float32]]]:
            with torch.autocast(fleet.device().type, getattr(torch, self.settings.dtype), enabled=self.settings.dtype != "float32"):
                return [(places, self(tokens).float().cpu().numpy()) for places, tokens in batches]

        made = [part for parts in fleet.spread(chunks, lambda places: self.batches(texts, places), vectors_of, "encode") for part in parts]
        vectors = np.empty((len(texts), made[0][1].shape[1]), dtype=np.float32)
        for places, part in made:
            vectors[places] = part
        return vectors

    def batches(self, texts: Sequence[str], places: list[int]) -> list[tuple[list[int], BatchEncoding]]:
        """The texts at `places` in batches of like length in tokens, each with its places; texts of one length in letters differ by a quarter in tokens."""
        cut = self.tokenizer([texts[place] for place in places], truncation=True, max_length=self.settings.passage_tokens)["input_ids"]
        made = []
        for chosen in fleet.by_length([len(ids) for ids in cut], self.settings.at_once):
            rows = [torch.tensor(cut[i]) for i in chosen]
            ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            made.append(([places[i] for i in chosen], BatchEncoding({"input_ids": ids, "attention_mask": mask})))
        return made

    def save(self, folder: Path) -> None:
        """Writes model and tokenizer in Hugging Face's format."""
        if fleet.is_main():
            self.model.save_pretrained(folder)  # type: ignore[operator]
            self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, name: str, settings: RetrieverSettings) -> Retriever:
        """From a folder or a hub name (safetensors only, no remote code), with float32 weights, on the run's device."""
        revision = {} if Path(name).is_dir() else {"revision": settings.revision}
        with loading(name):
            model = AutoModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True, **revision).to(fleet.device())
            tokenizer = AutoTokenizer.from_pretrained(name, **revision)
        limit = getattr(model.config, "max_position_embeddings", settings.passage_tokens)
        if settings.passage_tokens > limit:
            raise RetrieverError(f"{name} has {limit} positions. Lower retriever.passage_tokens from {settings.passage_tokens} to that or less.")
        return cls(model, tokenizer, settings)


def passage_text(passage: Passage) -> str:
    return f"{passage.title} {passage.text}".strip()


def crop(passage: Passage, rng: random.Random) -> str:
    """A random span of 20 to 60 percent of the words, with the title before it half the time."""
    words = passage.text.split()
    length = max(2, round(len(words) * rng.uniform(0.2, 0.6)))
    start = rng.randint(0, max(0, len(words) - length))
    title = [passage.title] if passage.title and rng.random() < KEEP_TITLE else []
    return " ".join(title + words[start : start + length])


def train_by_cropping(passages: Sequence[Passage], settings: RetrieverSettings, seed: int) -> Retriever:
    """The initial retriever: no labels, two random crops of one passage attract, crops of other passages repel.

    Contriever's recipe (Izacard et al. 2022), with in-batch negatives.
    """
    rng = random.Random(f"crops {seed}")
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=EMBEDDED_HIDDEN, num_hidden_layers=EMBEDDED_LAYERS, num_attention_heads=4,
        intermediate_size=2 * EMBEDDED_HIDDEN, pad_token_id=tokenizer.pad_token_id, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, max_position_embeddings=settings.passage_tokens,
    )  # fmt: skip
    retriever = Retriever(BertModel(config, add_pooling_layer=False), tokenizer, settings).to(fleet.device())
    optimizer = torch.optim.AdamW(retriever.parameters(), lr=settings.crop_rate)
    retriever.train()
    for _ in tqdm(range(settings.crop_steps), desc="crops", leave=False):
        chosen = rng.sample(passages, min(settings.crop_batch, len(passages)))
        vectors = nn.functional.normalize(retriever([crop(p, rng) for p in chosen + chosen]), dim=-1)
        logits = vectors[: len(chosen)] @ vectors[len(chosen) :].T / CROP_TEMPERATURE
        loss = nn.functional.cross_entropy(logits, torch.arange(len(chosen), device=logits.device))
        if not torch.isfinite(loss):
            raise RetrieverError("The retriever's loss is not a number. Lower retriever.crop_rate.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return retriever.eval()
