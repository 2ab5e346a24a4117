"""The guard around loading a model: whatever is wrong with it is said before any work."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from ragkit.errors import RagkitError

IN_A_FOLDER = (
    "its folder does not hold a whole model with safetensors weights and a tokenizer that fit each "
    "other and this machine. Save or fetch it again, or take another"
)
FROM_THE_HUB = (
    "it is no folder here, and the hub did not give it (no network, a wrong name, or gated: "
    "accept its terms there and run `hf auth login`). Give a local folder in the profile"
)


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
        why = IN_A_FOLDER if Path(name).is_dir() else FROM_THE_HUB
        what = (str(error).strip().splitlines() or [""])[0]
        raise RagkitError(
            f"Model {name!r} cannot be loaded: {why}. ({type(error).__name__}: {what})"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def refuse_missing(name: str, loaded: Mapping[str, Any]) -> None:
    """Raises RagkitError if weights were missing, by the loading info of `from_pretrained`.

    But for BERT's pooler, which nothing here uses.
    """
    missing = sorted(key for key in loaded["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise RagkitError(
            f"Model {name!r} lacks {len(missing)} of its weights ({', '.join(missing[:3])}...): "
            "they would be random. Save or fetch it again."
        )


def readable(text: str) -> str:
    """The text with lone surrogates, which no tokenizer takes, as question marks."""
    return text.encode("utf8", "replace").decode("utf8")
