"""How texts are compared: SQuAD's exact match and F1, DPR's 'the answer stands in the passage'.

Everything that matches strings does it here, so that curly quotes, dashes, full-width letters and
scripts without spaces count alike everywhere.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

# Signs that print alike become one: quotes, dashes, full-width forms; invisible ones go.
_ALIKE = (
    dict.fromkeys("‘’‛ʼ′`´", "'")
    | dict.fromkeys("“”„‟″", '"')
    | dict.fromkeys("‐‑‒–—―−", "-")
    | {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", "")
)
_FOLD = str.maketrans(_ALIKE)
_MARKS = "".join(
    chr(code)
    for start, stop in ((0x300, 0x2000), (0x20D0, 0x2100), (0x3000, 0x3100), (0xA660, 0xABFF))
    for code in range(start, stop)
    if unicodedata.category(chr(code)).startswith("M")
)
# Written without spaces, or with endings joined on: Thai, Lao, Burmese, Khmer, Hangul (after NFD),
# kana, Han. Here every sign with its marks counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff"
    "\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U000323af"
)
_SIGN = (
    rf"(?:[\u1100-\u115f][\u1160-\u11a7]?[\u11a8-\u11ff]?|(?![{_MARKS}])[{_UNSPACED}])[{_MARKS}]*"
)
_WORD = rf"[^\W_{_UNSPACED}]+(?:[{_MARKS}]+[^\W_{_UNSPACED}]*)*"
_CUT = re.compile(rf"{_WORD}|{_SIGN}|[^\w\s]|_")
_SIGNS = re.compile(_SIGN)


def folded(text: str) -> str:
    """Lower case, with one sign for signs that print alike."""
    return text.translate(_FOLD).casefold()


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    kept = "".join(
        sign
        for sign in unicodedata.normalize("NFC", folded(text))
        if sign not in string.punctuation and unicodedata.category(sign)[0] != "P"
    )
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1.0 if the answer equals a gold answer after normalisation (SQuAD; best over the golds)."""
    return float(any(normalise(answer) == normalise(gold) for gold in golds))


def f1(answer: str, golds: Sequence[str]) -> float:
    """Overlap of words after normalisation (SQuAD; best over the gold answers).

    Scripts without spaces are compared sign by sign (as in MLQA).
    """
    return max(_f1_one(_f1_words(answer), _f1_words(gold)) for gold in golds)


def _f1_words(text: str) -> list[str]:
    return _SIGNS.sub(r" \g<0> ", unicodedata.normalize("NFD", normalise(text))).split()


def _f1_one(answer: list[str], gold: list[str]) -> float:
    common = sum((Counter(answer) & Counter(gold)).values())
    if not answer or not gold:
        return float(answer == gold)
    return 2 * common / (len(answer) + len(gold))


def words(text: str) -> list[str]:
    """Lower-case words and signs of a text after NFD, as DPR's simple tokenizer cuts them."""
    return _CUT.findall(unicodedata.normalize("NFD", folded(text)))


def holds_answer(text: str, golds: Sequence[str]) -> bool:
    """Whether a gold answer stands in the text as a run of whole words (DPR's has_answer)."""
    spaced = f" {' '.join(words(text))} "
    return any(f" {' '.join(found)} " in spaced for gold in golds if (found := words(gold)))
