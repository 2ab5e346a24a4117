"""No result is typed: a sentence that names a direction or a number is computed by a cell, or it is
in the list of those that say what is meant, asked or supposed, not what was found."""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).parent / "hedged.txt"
COMPARED = "more less fewer most least higher lower highest lowest better worse best worst larger "
COMPARED += (
    "smaller largest smallest stronger weaker ahead behind rises rise falls fall gains loses "
)
COMPARED += "improves beats exceeds doubles halves improve lose wider narrower earlier later"
TELLING = re.compile(rf"\b(?:{'|'.join(COMPARED.split())})\b|\d\s?%|\d\.\d", re.IGNORECASE)
FENCED = re.compile(
    r"```.*?```|<!--.*?/[a-z]+ -->|^\s*\|.*?$|\$\$.*?\$\$", re.DOTALL | re.MULTILINE
)


def sentences(text):
    """The telling sentences of a text in Markdown: no code, no tables, no formulas."""
    plain = re.sub(r"\s+", " ", FENCED.sub(" ", text).replace("\n\n", ". "))
    parts = re.split(r"(?<=[.?!:])\s+(?=[A-Z*`<])", plain)
    return {one.strip() for one in parts if TELLING.search(one)}


def told():
    """Every telling sentence, with the file that it stands in."""
    found = {}
    for path in sorted((ROOT / "notebooks").rglob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        for cell in (one for one in cells if one.cell_type == "markdown"):
            found |= dict.fromkeys(sentences(cell.source), path.name)
    for path in (ROOT / "README.md", ROOT / "ragkit/assets/lesson_plan.md"):
        found |= dict.fromkeys(sentences(path.read_text("utf8")), path.name)
    return found


def test_a_sentence_that_tells_a_result_is_computed():
    """A new one that matches is a result: compute it in a cell. Or it only says what is asked,
    meant or supposed: then add it to the list, after a second reading."""
    allowed, found = set(LIST.read_text("utf8").splitlines()), told()
    assert {file: one for one, file in found.items() if one not in allowed} == {}
    assert allowed <= set(found), "no longer told: take it out of the list"


def test_a_typed_result_would_be_seen():
    typed = "The fine-tuned reader teaches more. Here `balanced` gains 3 %. It is a reader."
    assert len(sentences(typed)) == 2
