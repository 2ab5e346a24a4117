"""The guard around loading a model: whatever is wrong with it is said before any work."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from ragkit.errors import RagkitError


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turns what goes wrong with a model inside into a sentence; keeps the libraries quiet."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except RagkitError:
        raise
    except Exception as error:  # libraries raise anything over an odd folder
        why = "its folder lacks safetensors weights or a tokenizer that work here. Fetch it again"
        if not Path(name).is_dir():
            why = "there is no such folder, and the hub did not give it (no network, a wrong name, "
            why += "or terms to accept: `hf auth login`). Give a local folder"
        what = f"{type(error).__name__}: {' '.join(str(error).strip().splitlines()[:1])}"
        raise RagkitError(f"Model {name!r} cannot be loaded: {why}. ({what})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def refuse_missing(name: str, loaded: Mapping[str, Any]) -> None:
    """Raises RagkitError if weights were missing, by the loading info of `from_pretrained`; not for
    BERT's pooler, which nothing here uses."""
    if lacks := sorted(one for one in loaded["missing_keys"] if not one.startswith("pooler.")):
        told = f"Model {name!r} lacks {len(lacks)} of its weights ({', '.join(lacks[:3])}...): "
        raise RagkitError(told + "they would be random. Save or fetch it again.")


def readable(text: str) -> str:
    """The text with lone surrogates, which no tokenizer takes, as question marks."""
    return text.encode("utf8", "replace").decode("utf8")
