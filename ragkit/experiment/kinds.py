"""The kinds of stages: what makes each, of what, by which settings, and its unit of work.

A line a kind; `ragkit.experiment.graph` makes a profile's stages of it. Roles of inputs and names
of settings are those that the makers read; the graph says what each is.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of stage; `maker` is `room.module:function` below the package."""

    maker: str
    inputs: tuple[str, ...]
    settings: tuple[str, ...]
    unit: str


FOUND = ("passages", "questions", "candidates")
SEARCHED = ("passages", "questions", "retriever", "vectors", "index")
READ = ("reader", "weights", "which", "k")  # a reader, and which of the run's readers it is
KINDS = {
    "passages": Kind("data.sets:make_passages", (), ("set",), "passages"),
    "questions": Kind("data.sets:make_questions", ("passages",), ("set",), "questions"),
    "retriever": Kind(
        "models.retriever:make_retriever",
        ("crops",),
        ("retriever", "seed", "world", "weights"),
        "crop steps",
    ),
    "vectors": Kind(
        "models.index:make_vectors", ("passages", "retriever"), ("retriever", "index"), "passages"
    ),
    "index": Kind("models.index:make_index", ("vectors",), ("index", "seed"), "passages"),
    "candidates": Kind(
        "models.index:make_candidates", SEARCHED, ("retriever", "index"), "questions"
    ),
    "bm25": Kind("models.index:make_bm25", ("passages", "questions"), (), "passages"),
    "nouns": Kind(
        "indicators.nouns:make_nouns",
        ("questions",),
        ("nouns", "state", "seed", "world"),
        "questions",
    ),
    "style": Kind(
        "models.answers:make_style",
        FOUND,
        ("reader", "weights", "answered", "k", "clozes"),
        "answers",
    ),
    "step1": Kind(
        "models.step1:make_step1",
        (*FOUND, "retriever"),
        ("reader", "weights", "set", "retriever", "k", "seed"),
        "prompts",
    ),
    "teacher": Kind(
        "distillation.teacher:make_teacher", (*FOUND, "by"), (*READ, "questions"), "questions"
    ),
    "loop": Kind(
        "distillation.teacher:make_loop", (*FOUND, "by"), (*READ, "questions"), "questions"
    ),
    "tokens": Kind(
        "indicators.closeness:make_tokens", (*FOUND, "by"), (*READ, "questions"), "questions"
    ),
    "contextual": Kind(
        "indicators.closeness:make_contextual",
        (*FOUND, "nouns"),
        ("reader", "weights", "questions", "k"),
        "questions",
    ),
    "closeness": Kind(
        "indicators.closeness:make_closeness",
        (*FOUND, "nouns", "by", "style", "tokens", "contextual", "retriever"),
        (*READ, "questions", "retriever", "seed"),
        "questions",
    ),
    "probe": Kind(
        "indicators.closeness:make_probe",
        (*FOUND, "nouns", "by", "style"),
        (*READ, "questions", "attention", "share"),
        "questions",
    ),
    "premises": Kind(
        "models.answers:make_premises", (*FOUND, "by"), (*READ, "answered", "seed"), "answers"
    ),
    "answers": Kind(
        "models.answers:make_answers",
        ("passages", "questions", "ranking", "by"),
        (*READ, "answered", "closed_book"),
        "answers",
    ),
    "step2": Kind(
        "distillation.step2:make_step2",
        (*SEARCHED, "candidates", "look"),
        (
            *("target", "distill", "attention", "retriever", "index", "k"),
            *("seed", "shuffle_seed", "keep"),
        ),
        "questions",
    ),
}
