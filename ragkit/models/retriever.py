"""The retriever: a sentence-transformers model, from outside or trained here by cropping."""

import random
import string
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.util import batch_to_device
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from ragkit.data.corpus import PASSAGES, Passage, Passages, passage_text
from ragkit.data.text import readable
from ragkit.data.worlds import open_prose
from ragkit.errors import RetrieverError
from ragkit.models import device
from ragkit.settings import RetrieverSettings, asset

CROP_TEMPERATURE, KEEP_TITLE = 0.1, 0.5
ALIKE = 16  # crops in one pass: those of like length, for the shorter are padded
CHUNK = 8  # batches that one process encodes in one go
PROMPTS = {"query": ("query",), "passage": ("document", "passage", "corpus")}  # names in folders


class Retriever(nn.Module):
    """Encodes questions and passages (`title text`, see `passage_text`), by `kind`: `query` or
    `passage`, each with the prompt, such as e5's `query: `, that the model's folder names for it.
    `model` and `tokenizer` are those of transformers inside it."""

    def __init__(self, encoder: SentenceTransformer, settings: RetrieverSettings) -> None:
        super().__init__()
        self.encoder, self.settings, self.tokenizer = encoder, settings, encoder.tokenizer
        self.prompts: dict[str, str] = {}  # what stands before every text of a kind
        for kind, names in PROMPTS.items():
            named = [*names, encoder.default_prompt_name or ""]
            self.prompts[kind] = next(filter(None, map(encoder.prompts.get, named)), "")

    @property
    def model(self) -> Any:
        return self.encoder.transformers_model

    def forward(self, texts: Sequence[str], kind: str = "query") -> Tensor:
        """Vectors `[texts, dimensions]` with gradients, of texts cut at `passage_tokens`."""
        batch = self.encoder.preprocess(list(map(readable, texts)), prompt=self.prompts[kind])
        return self.encoder(batch_to_device(batch, device.device()))["sentence_embedding"]

    def encode(self, texts: Sequence[str], kind: str = "query") -> NDArray[np.float32]:
        """Vectors `[texts, dimensions]`, made by all processes; RetrieverError if not finite."""
        given, at_once = list(map(readable, texts)), self.settings.at_once
        quiet: dict[str, Any] = {"batch_size": at_once, "show_progress_bar": False}
        work = partial(self.encoder.encode, prompt=self.prompts[kind], **quiet)
        dtype = getattr(torch, self.settings.dtype)
        with torch.autocast(device.device().type, dtype, enabled=dtype != torch.float32):
            rows = device.spread(given, CHUNK * at_once, work, "encode")
        if np.isfinite(made := np.stack(rows).astype(np.float32)).all():
            return made
        why = "the retriever is damaged, or its training went astray (lower distill.rate)"
        raise RetrieverError(f"Some vectors hold values that are not finite: {why}.")

    def save(self, folder: Path) -> None:
        """Writes it as a folder that sentence-transformers reads."""
        self.encoder.save(str(folder), create_model_card=False)

    @classmethod
    def open(cls, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> "Retriever":
        """The retriever among a stage's inputs."""
        return cls.load(inputs["retriever"] / "model", RetrieverSettings(**settings["retriever"]))

    @classmethod
    def load(cls, name: str | Path, settings: RetrieverSettings) -> "Retriever":
        """From a folder or a hub name (safetensors only, no remote code), in float32, with its own
        pooling, normalisation, prompts, unless the settings say otherwise. Else a RagkitError."""
        path, place, safe = str(name), str(device.device()), {"use_safetensors": True}
        revision: dict[str, Any] = {"revision": settings.revision}
        with device.loading(path):
            weights = {"dtype": torch.float32, **safe}
            encoder = SentenceTransformer(path, device=place, model_kwargs=weights, **revision)
            retriever = cls(encoder, settings)
            model, tokenizer = retriever.model, retriever.tokenizer
            # the weights are looked up once more: only transformers tells which were missing
            told = {"device_map": "meta", "output_loading_info": True, **safe, **revision}
            device.refuse_missing(path, type(model).from_pretrained(model.name_or_path, **told)[1])
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
            limit = getattr(model.config, "max_position_embeddings", None) or 0
            if 0 < limit < settings.passage_tokens:
                what = f"retriever.passage_tokens from {settings.passage_tokens} to that or less"
                raise RetrieverError(f"{name} has {limit} positions. Lower {what}.")
            encoder.max_seq_length, modules = settings.passage_tokens, encoder._modules
            for key, one in list(modules.items()):
                if isinstance(one, Normalize) and settings.normalise is not None:
                    del modules[key]
            if settings.normalise:
                modules["normalise"] = Normalize()
            with torch.no_grad():
                retriever(["a a"])
        return retriever.eval()


def embedded_tokenizer() -> PreTrainedTokenizerFast:
    """That of all embedded models, WordPiece; made in `notebooks/appendix/pretraining.ipynb`."""
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "bos", "eos")}
    file = str(asset("reader/tokenizer.json"))
    return PreTrainedTokenizerFast(tokenizer_file=file, model_max_length=1024, **special)


def with_pieces_of(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """The embedded tokenizer with word pieces learnt from texts. The trainer numbers what single
    signs it meets by chance, and by these numbers it breaks ties: so it is given them in order."""
    made = embedded_tokenizer()
    own = made.backend_tokenizer
    signs = sorted({*"".join(map(own.normalizer.normalize_str, texts))} - {*string.whitespace})
    known = [*made.convert_ids_to_tokens([*range(len(made.all_special_tokens))])]
    known += [*signs, *(f"##{sign}" for sign in signs)]
    learner = Tokenizer(WordPiece(unk_token=made.unk_token))
    learner.normalizer, learner.pre_tokenizer = own.normalizer, own.pre_tokenizer
    trainer = WordPieceTrainer(vocab_size=size, special_tokens=known, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    own.model = WordPiece(learner.get_vocab(), unk_token=made.unk_token)
    return made


def crop(passage: Passage, rng: random.Random) -> str:
    """A random span of 20 to 60 percent of the words, with the title before it half the time."""
    words = passage.text.split()
    length = max(2, round(len(words) * rng.uniform(0.2, 0.6)))
    start = rng.randint(0, max(0, len(words) - length))
    title = [passage.title] if passage.title and rng.random() < KEEP_TITLE else []
    return " ".join(title + words[start : start + length])


def train_by_cropping(
    passages: Sequence[Passage],
    tokenizer: PreTrainedTokenizerFast,
    settings: RetrieverSettings,
    seed: int,
) -> Retriever:
    """The embedded retriever, a small BERT with mean pooling and unit length: two random crops of a
    passage attract, those of others in the batch repel (Contriever, Izacard et al. 2022)."""
    rng = random.Random(f"crops {seed}")
    torch.manual_seed(seed)
    config = BertConfig.from_json_file(asset("retriever.json"))
    config.vocab_size = len(tokenizer)
    config.max_position_embeddings = settings.passage_tokens
    unit = settings.model_copy(update={"normalise": settings.normalise is not False})
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        retriever = Retriever.load(folder, unit).train()
    optimizer = torch.optim.AdamW(retriever.parameters(), lr=settings.crop_rate)
    for _ in tqdm(range(settings.crop_steps), desc="crops", leave=False):
        chosen = rng.sample(passages, min(settings.crop_batch, len(passages)))
        crops = [crop(p, rng) for p in chosen + chosen]
        by_length = sorted(range(len(crops)), key=lambda place: len(crops[place]))
        parts = [by_length[at : at + ALIKE] for at in range(0, len(crops), ALIKE)]
        encoded = torch.cat([retriever([crops[place] for place in part]) for part in parts])
        places = torch.tensor(by_length, device=encoded.device).argsort()
        vectors = nn.functional.normalize(encoded[places], dim=-1)
        logits = vectors[: len(chosen)] @ vectors[len(chosen) :].T / CROP_TEMPERATURE
        loss = nn.functional.cross_entropy(logits, torch.arange(len(chosen), device=logits.device))
        if not torch.isfinite(loss):
            raise RetrieverError("The retriever's loss is not a number. Lower retriever.crop_rate.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return retriever.eval()


def make_retriever(folder: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """The initial retriever, in `folder/model`. The embedded one is trained on the passages: in a
    world and on as much prose with questions' words, for one never met would be noise in vectors;
    on real text by word pieces that it learns there too."""
    if not device.is_main():  # it is small, or only copied
        return
    chosen, seed = RetrieverSettings(**settings["retriever"]), settings["seed"]
    if chosen.model == "embedded":
        passages, tokenizer = list(Passages(inputs["passages"] / PASSAGES)), embedded_tokenizer()
        if settings["world"] is None:
            tokenizer = with_pieces_of([*map(passage_text, passages)], chosen.vocabulary)
        else:
            rng = random.Random(f"prose {seed}")
            prose = open_prose(settings["world"], len(passages), rng)
            passages += [Passage("", "", sentence) for sentence in prose]
        retriever = train_by_cropping(passages, tokenizer, chosen, seed)
    else:
        retriever = Retriever.load(chosen.model, chosen)
    retriever.save(folder / "model")
