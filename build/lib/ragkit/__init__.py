"""ragkit: the package behind the companion notebooks on attention distillation.

`ragkit.judge` (see `ragkit.judging`) judges a reader of one's own; everything else is in the modules.
"""

from __future__ import annotations

from typing import Any


class RagkitError(Exception):
    """A problem the user can mend; the message says what was wrong, where, and what to do."""


def __getattr__(name: str) -> Any:
    """`ragkit.judge` is loaded when it is asked for, so that importing the package, or one small module of it, stays light."""
    if name == "judge":
        from ragkit.pages.judge import judge

        return judge
    raise AttributeError(f"module 'ragkit' has no attribute {name!r}")
