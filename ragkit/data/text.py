"""How texts are compared: SQuAD's exact match and F1, DPR's 'the answer stands in the passage'.
Everything that matches strings does it here, so that curly quotes, dashes, full-width letters and
scripts without spaces count alike everywhere."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal

# Signs that print alike become one: quotes, dashes, full-width forms; invisible ones go.
_FOLD = str.maketrans(
    dict.fromkeys("‘’‛ʼ′`´", "'")
    | dict.fromkeys("“”„‟″", '"')
    | dict.fromkeys("‐‑‒–—―−", "-")
    | {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", "")
)
_MARKS = "".join(sign for sign in map(chr, range(0xAC00)) if unicodedata.category(sign)[0] == "M")
# Written without spaces, or with endings joined on: Thai, Lao, Burmese, Khmer, Hangul (after NFD),
# kana, Han. Here every sign with its marks counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
)
_HANGUL = "[\u1100-\u115f][\u1160-\u11a7]?[\u11a8-\u11ff]?"  # one syllable
_SIGN = rf"(?:{_HANGUL}|(?![{_MARKS}])[{_UNSPACED}])[{_MARKS}]*"
_WORD = rf"[^\W_{_UNSPACED}]+(?:[{_MARKS}]+[^\W_{_UNSPACED}]*)*"


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
    """Overlap of words after normalisation (SQuAD; best over the gold answers); scripts without
    spaces are compared sign by sign (as in MLQA)."""
    texts = [unicodedata.normalize("NFD", normalise(one)) for one in (answer, *golds)]
    given, *wanted = (Counter(re.sub(_SIGN, r" \g<0> ", one).split()) for one in texts)
    totals = [given.total() + gold.total() for gold in wanted]
    both = [2 * (given & gold).total() for gold in wanted]
    return max(n / total if total else 1.0 for n, total in zip(both, totals, strict=True))


def words(text: str) -> list[str]:
    """Lower-case words and signs of a text after NFD, as DPR's simple tokenizer cuts them."""
    return re.findall(rf"{_WORD}|{_SIGN}|[^\w\s]|_", folded(text, "NFD"))


def holds_answer(text: str, golds: Sequence[str]) -> bool:
    """Whether a gold answer stands in the text as a run of whole words (DPR's has_answer)."""
    spaced = f" {' '.join(words(text))} "
    return any(f" {' '.join(found)} " in spaced for gold in golds if (found := words(gold)))
