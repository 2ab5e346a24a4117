"""GGUF files as readers by transformers' loader: what it reads wrongly is mended or refused."""

from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf import read_gguf_metadata
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from ragkit.errors import ReaderError

# How byte-level tokenizers cut texts into words, by llama.cpp's names (`llama-vocab.cpp`) of those
# that transformers does not know, and cuts like GPT-2: rightly so, or but for digits, each alone.
LIKE_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion")
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def check(path: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """ReaderError if the model or tokenizer lacks what the file has; mends how digits are cut."""
    from gguf import GGUFReader  # where it is missing, `device.loading` says so

    told, names = read_gguf_metadata(str(path))
    kind, cut = told.get("tokenizer.ggml.model"), told.get("tokenizer.ggml.pre")
    there = sum(int(one.n_elements) for one in GGUFReader(path).tensors)
    read = sum(one.numel() for one in model.parameters())
    scaled = told.get(f"{told['general.architecture']}.rope.scaling.type", "none")
    kept = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    known = kind != "gpt2" or cut in (*GGUF_PRE_TOKENIZER_SPLITS, *LIKE_GPT2, *DIGITS)
    for is_wrong, it in (
        (there > read, f"{there - read} of its {there} weights in {len(names)} tensors"),
        (scaled != "none" and kept == "default", f"the scaling of its positions ({scaled})"),
        (not known, f"how its tokenizer cuts words ({cut})"),
    ):
        if is_wrong:
            raise ReaderError(f"{path}: transformers does not read {it}. Give the model's folder.")
    if kind == "gpt2" and cut in DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
