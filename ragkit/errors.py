"""The errors of the package: each is a problem that the user can mend."""


class RagkitError(Exception):
    """A problem the user can mend; the message says what was wrong, where, and what to do."""


class ProfileError(RagkitError):
    """A profile that cannot be used, or not here; the message names the key."""


class DataError(RagkitError):
    """Data, or what is read from it, that cannot be used; the message names the place."""


class RetrieverError(RagkitError):
    """A retriever that cannot be loaded or trained, vectors or a search that cannot be used."""


class ReaderError(RagkitError):
    """A reader that cannot be loaded, fed or trained."""


class NounsError(RagkitError):
    """No spaCy pipeline finds the nouns of a set's questions; the message says how to get one."""


class StoreError(RagkitError):
    """A run folder, or a file to write, that cannot be used."""


class NotebookError(RagkitError):
    """A notebook that cannot be run or that failed, or an exercise that is not as it should be."""
