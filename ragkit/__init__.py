"""ragkit: the package behind the companion notebooks on attention distillation."""


class RagkitError(Exception):
    """A problem the user can mend; the message says what was wrong, where, and what to do."""
