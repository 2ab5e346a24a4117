"""The errors of the package: each is a problem that the user can mend."""

from __future__ import annotations


class RagkitError(Exception):
    """A problem the user can mend; the message says what was wrong, where, and what to do."""


class NotebookError(RagkitError):
    """A notebook that cannot be run, or that failed."""


class DataError(RagkitError):
    """Data cannot be used; the message names file and line, or table and column."""


class SpeechError(RagkitError):
    """A word that no wording or name of the embedded worlds holds; the message names it."""


class MonitorError(RagkitError):
    """There is nothing to follow."""


class DistillError(RagkitError):
    """A target or a training step that cannot be used."""


class ClaimError(RagkitError):
    """The ledger or the paper's fill-in file cannot be read."""


class StoreError(RagkitError):
    """A run folder cannot be used."""


class IndicatorError(RagkitError):
    """Indicators cannot be computed from this input."""


class NounsError(RagkitError):
    """No pipeline finds the nouns of a set's questions; the message says how to get one."""


class CheckpointError(RagkitError):
    """A checkpoint that belongs to another training."""


class MachineError(RagkitError):
    """This machine is not what the profile asks for."""


class SearchError(RagkitError):
    """A search that cannot be done."""


class ReaderError(RagkitError):
    """A reader cannot be loaded, fed or trained."""


class RetrieverError(RagkitError):
    """A retriever cannot be loaded or trained."""


class VectorsError(RagkitError):
    """Vectors on disk that cannot be written or read; the message names the file."""


class CourseError(RagkitError):
    """An exercise is not written as it should be, or does not hold what it promises."""


class JudgeError(RagkitError):
    """A reader cannot be judged on these questions; the message says why."""


class ProfileError(RagkitError):
    """The profile cannot be used; the message names the file and the key."""


class PlanError(RagkitError):
    """A plan cannot be made or held against a run."""
