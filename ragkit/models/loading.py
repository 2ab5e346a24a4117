"""Loading models: a clear word on one that cannot be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from safetensors import SafetensorError

from ragkit.errors import RagkitError


@contextmanager
def loading(name: str) -> Iterator[None]:
    """A clear word on a model that cannot be loaded, in place of the libraries' own; no bar for
    every load.
    """
    transformers.logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if "gated" in str(error).lower():
            why = (
                "it is gated: accept its terms at the hub and log in (`hf auth login`), "
                "or give a local folder in the profile"
            )
        elif Path(name).is_dir():
            why = (
                "its folder does not hold a whole model with safetensors weights and a tokenizer. "
                "Save or fetch it again"
            )
        else:
            why = (
                "it is no folder here, and the hub did not give it (no network, a wrong name, "
                "or a gated model). Give a local folder in the profile"
            )
        raise RagkitError(
            f"Model {name!r} cannot be loaded: {why}. ({str(error).splitlines()[0]})"
        ) from None
