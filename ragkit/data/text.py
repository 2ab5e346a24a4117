"""How texts are compared: SQuAD's exact match and F1, DPR's 'the answer stands in the passage';
curly quotes, dashes, full-width letters and scripts without spaces count alike everywhere."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import yaml

from ragkit.settings import asset

SIGNS: dict[str, Any] = yaml.safe_load(asset("signs.yaml").read_text("utf8"))
_ALIKE = {sign: one for one, signs in SIGNS["alike"].items() for sign in signs}
_FOLD = str.maketrans(_ALIKE | {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)})
_MARKS = "".join(sign for sign in map(chr, range(0xAC00)) if unicodedata.category(sign)[0] == "M")
_UNSPACED = "".join(SIGNS["unspaced"].values())
_SIGN = rf"(?:{SIGNS['syllable']}|(?![{_MARKS}])[{_UNSPACED}])[{_MARKS}]*"
_WORD = rf"[^\W_{_UNSPACED}]+(?:[{_MARKS}]+[^\W_{_UNSPACED}]*)*"
_CUT = rf"{_WORD}|{_SIGN}|[^\w\s]|_"


def folded(text: str, form: Literal["NFC", "NFD"]) -> str:
    """Lower case in a form of Unicode, with one sign for signs that print alike."""
    return unicodedata.normalize(form, text.translate(_FOLD).casefold())


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    signs = (sign for sign in folded(text, "NFC") if sign not in string.punctuation)
    kept = "".join(sign for sign in signs if unicodedata.category(sign)[0] != "P")
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def same_question(text: str) -> str:
    """What two texts of one question have in common: their words after normalisation."""
    return normalise(text) or text


def readable(text: str) -> str:
    """The text with lone surrogates, which no tokenizer takes, as question marks."""
    return text.encode("utf8", "replace").decode("utf8")


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1.0 if the answer equals a gold answer after normalisation (SQuAD; best over the golds)."""
    return float(normalise(answer) in map(normalise, golds))


def f1(answer: str, golds: Sequence[str]) -> float:
    """Overlap of normalised words (SQuAD; best gold answer); unspaced scripts by signs (MLQA)."""
    texts = [unicodedata.normalize("NFD", normalise(one)) for one in (answer, *golds)]
    given, *wanted = (Counter(re.sub(_SIGN, r" \g<0> ", one).split()) for one in texts)
    totals = [given.total() + gold.total() for gold in wanted]
    both = [2 * (given & gold).total() for gold in wanted]
    return max(n / total if total else 1.0 for n, total in zip(both, totals, strict=True))


def words(text: str) -> list[str]:
    """Lower-case words and signs of a text after NFD, as DPR's simple tokenizer cuts them."""
    return re.findall(_CUT, folded(text, "NFD"))


def word_places(text: str) -> list[tuple[int, int]]:
    """Where the words and signs of a text start and end, by their characters."""
    return [found.span() for found in re.finditer(_CUT, text)]


def holds_answer(text: str, golds: Sequence[str]) -> bool:
    """Whether a gold answer stands in the text as a run of whole words (DPR's has_answer)."""
    spaced = f" {' '.join(words(text))} "
    return any(f" {' '.join(found)} " in spaced for gold in golds if (found := words(gold)))
