"""The errors of the package: each is a problem that the user can mend."""


class RagkitError(Exception):
    """A problem the user can mend; the message says what was wrong, where, and what to do."""


class ProfileError(RagkitError):
    """A profile that cannot be used, or not here; the message names the key."""


class DataError(RagkitError):
    """Data that cannot be used; the message names file and line, or table and column."""


class RetrieverError(RagkitError):
    """A retriever that cannot be loaded or trained, vectors or a search that cannot be used."""


class ReaderError(RagkitError):
    """A reader that cannot be loaded, fed or trained."""


class DistillError(RagkitError):
    """A target, a training step or its log that cannot be used."""


class IndicatorError(RagkitError):
    """Indicators that cannot be computed from this input."""


class NounsError(RagkitError):
    """No spaCy pipeline finds the nouns of a set's questions; the message says how to get one."""


class StoreError(RagkitError):
    """A run folder that cannot be used."""


class NotebookError(RagkitError):
    """A notebook that cannot be run, or that failed."""


class JudgeError(RagkitError):
    """A reader that cannot be judged on these questions; the message says why."""


class CourseError(RagkitError):
    """An exercise that is not written as it should be, or does not hold what it promises."""
