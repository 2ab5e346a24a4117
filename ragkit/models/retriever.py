"""The retriever: a sentence-transformers model, from outside or trained here by cropping."""

import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

from ragkit.data.passages import Passage, Passages
from ragkit.data.questions import PASSAGES
from ragkit.data.vocabulary import build_tokenizer
from ragkit.data.worlds import open_prose
from ragkit.errors import RetrieverError
from ragkit.models import device
from ragkit.models.loading import loading, readable, refuse_missing
from ragkit.settings import RetrieverSettings

HIDDEN, LAYERS, HEADS = 128, 2, 4  # of the embedded retriever
CROP_TEMPERATURE = 0.1
KEEP_TITLE = 0.5
CHUNK = 8  # batches that one process encodes in one go
PROMPTS = {"query": ("query",), "passage": ("document", "passage", "corpus")}  # names in folders


class Retriever(nn.Module):
    """Encodes questions and passages; a passage is read as `title text`, see `passage_text`.

    `kind` is `query` or `passage`: it chooses the prompt, such as e5's `query: `, that the model's
    folder names for it. `model` and `tokenizer` are those of transformers inside it.
    """

    def __init__(self, encoder: SentenceTransformer, settings: RetrieverSettings) -> None:
        super().__init__()
        self.encoder, self.settings = encoder, settings

    @property
    def model(self) -> Any:
        return self.encoder.transformers_model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.encoder.tokenizer

    def prompt(self, kind: str) -> str:
        """What stands before every text of this kind."""
        names = (*PROMPTS[kind], self.encoder.default_prompt_name or "")
        return next((text for name in names if (text := self.encoder.prompts.get(name))), "")

    def tokens(self, texts: Sequence[str], kind: str = "query") -> dict[str, Any]:
        """The texts as ids and mask `[texts, tokens]`, cut at `passage_tokens`."""
        given = [readable(text) for text in texts]
        return self.encoder.preprocess(given, prompt=self.prompt(kind))

    def forward(self, texts: Sequence[str] | Mapping[str, Any], kind: str = "query") -> Tensor:
        """Vectors `[texts, dimensions]` of texts or their tokens, with gradients."""
        batch = dict(texts) if isinstance(texts, Mapping) else self.tokens(texts, kind)
        return self.encoder(batch_to_device(batch, device.device()))["sentence_embedding"]

    def encode(self, texts: Sequence[str], kind: str = "query") -> NDArray[np.float32]:
        """Vectors `[texts, dimensions]` in the order given, in `settings.dtype`.

        The processes of a run share the texts, and each gets all vectors.
        """
        settings, prompt = self.settings, self.prompt(kind)
        place, lower = device.device(), settings.dtype != "float32"

        def work(chosen: list[str]) -> NDArray[np.float32]:
            with torch.autocast(place.type, getattr(torch, settings.dtype), enabled=lower):
                made = self.encoder.encode(
                    chosen, prompt=prompt, batch_size=settings.at_once, show_progress_bar=False
                )
            return made.astype(np.float32)

        chunks = device.by_length([len(text) for text in texts], CHUNK * settings.at_once)
        made = device.spread(chunks, lambda c: [readable(texts[i]) for i in c], work, "encode")
        vectors = np.empty((len(texts), made[0].shape[1]), np.float32)
        for places, part in zip(chunks, made, strict=True):
            vectors[places] = part
        return vectors

    def save(self, folder: Path) -> None:
        """Writes it as a folder that sentence-transformers reads."""
        if device.is_main():
            self.encoder.save(str(folder), create_model_card=False)

    @classmethod
    def load(cls, name: str | Path, settings: RetrieverSettings) -> "Retriever":
        """From a folder or a hub name (safetensors only, no remote code), in float32.

        Pooling, normalisation and prompts are the folder's own; `settings.pooling` and `normalise`
        override them. Raises RagkitError if it cannot be loaded and used.
        """
        revision = None if Path(name).is_dir() else settings.revision
        weights = {"dtype": torch.float32, "use_safetensors": True}
        with loading(str(name)):
            encoder = SentenceTransformer(
                str(name), device=str(device.device()), revision=revision, model_kwargs=weights
            )
            retriever = cls(encoder, settings)
            model: Any = type(retriever.model)  # whose weights are looked up but not read again
            options = {"device_map": "meta", "output_loading_info": True, "use_safetensors": True}
            place = retriever.model.name_or_path
            options |= {} if revision is None else {"revision": revision}
            refuse_missing(str(name), model.from_pretrained(place, **options)[1])
            tokenizer = retriever.tokenizer
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
            retriever.adjust(str(name))
            with torch.no_grad():
                retriever(["a a"])
        return retriever.eval()

    def adjust(self, name: str) -> None:
        """Makes the settings that override the folder's own."""
        settings, modules = self.settings, self.encoder._modules
        limit = getattr(self.model.config, "max_position_embeddings", None) or 0
        if 0 < limit < settings.passage_tokens:
            raise RetrieverError(
                f"{name} has {limit} positions. Lower retriever.passage_tokens "
                f"from {settings.passage_tokens} to that or less."
            )
        self.encoder.max_seq_length = settings.passage_tokens
        if settings.pooling is not None:
            pooling = [key for key, one in modules.items() if isinstance(one, Pooling)]
            size = self.model.config.hidden_size
            modules[pooling[0]] = Pooling(size, settings.pooling)
        unit = [key for key, one in modules.items() if isinstance(one, Normalize)]
        if settings.normalise is False:
            for key in unit:
                del modules[key]
        elif settings.normalise and not unit:
            modules["normalise"] = Normalize()


def crop(passage: Passage, rng: random.Random) -> str:
    """A random span of 20 to 60 percent of the words, with the title before it half the time."""
    words = passage.text.split()
    length = max(2, round(len(words) * rng.uniform(0.2, 0.6)))
    start = rng.randint(0, max(0, len(words) - length))
    title = [passage.title] if passage.title and rng.random() < KEEP_TITLE else []
    return " ".join(title + words[start : start + length])


def untrained(settings: RetrieverSettings) -> Retriever:
    """The embedded retriever before its training: a small BERT, mean pooling, unit length."""
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
    unit = settings.normalise is not False
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return Retriever.load(folder, settings.model_copy(update={"normalise": unit}))


def train_by_cropping(
    passages: Sequence[Passage], settings: RetrieverSettings, seed: int
) -> Retriever:
    """The initial retriever: two random crops of a passage attract, those of others repel.

    Contriever's recipe without labels (Izacard et al. 2022), with in-batch negatives.
    """
    rng = random.Random(f"crops {seed}")
    torch.manual_seed(seed)
    retriever = untrained(settings).train()
    optimizer = torch.optim.AdamW(retriever.parameters(), lr=settings.crop_rate)
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
    words of questions: a word it never met would be noise in every vector.
    """
    if not device.is_main():  # it is small, or only copied
        return
    chosen, seed = RetrieverSettings(**settings["retriever"]), settings["seed"]
    if chosen.model == "embedded":
        passages = list(Passages(inputs["passages"] / PASSAGES))
        if settings["world"] is not None:
            rng = random.Random(f"prose {seed}")
            prose = open_prose(settings["world"], len(passages), rng)
            passages += [Passage("", "", sentence) for sentence in prose]
        retriever = train_by_cropping(passages, chosen, seed)
    else:
        retriever = Retriever.load(chosen.model, chosen)
    retriever.save(folder / "model")
