"""Texts compared: SQuAD's and DPR's rules on Latin text, and their like in other scripts."""

import re
import string
import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.data.text import exact_match, f1, holds_answer, normalise, words


def squad_normalise(text):
    """As in SQuAD's evaluate-v1.1.py."""
    text = "".join(ch for ch in text.lower() if ch not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_f1(answer, gold):
    answer, gold = squad_normalise(answer).split(), squad_normalise(gold).split()
    same = sum((Counter(answer) & Counter(gold)).values())
    if same == 0:
        return float(not answer and not gold)
    precision, recall = same / len(answer), same / len(gold)
    return 2 * precision * recall / (precision + recall)


LATIN = st.text(string.printable + "äöüéèñçøåÄÖÜÉ", max_size=40)


@given(LATIN, LATIN)
def test_latin_text_counts_as_in_squad(answer, gold):
    assert normalise(answer) == squad_normalise(unicodedata.normalize("NFC", answer)).replace(
        "´", ""
    )
    assert exact_match(answer, [gold]) == (squad_normalise(answer) == squad_normalise(gold))
    assert f1(answer, [gold]) == pytest.approx(squad_f1(answer, gold))


@given(LATIN)
def test_latin_words_are_those_of_dprs_tokenizer(text):
    """Runs of letters, digits and marks after NFD, else single signs."""
    decomposed = unicodedata.normalize("NFD", text.replace("`", "'")).lower()
    found = re.findall(r"[^\W_]+(?:[\u0300-\u036f][^\W_]*)*|[^\w\s]|_", decomposed)
    assert words(text) == found


@pytest.mark.parametrize(
    ("text", "gold", "holds"),
    [
        ("It was Brann's.", "Brann’s", True),
        ("from 1939–1945 on", "1939-1945", True),
        ("the co\u00adoperation", "cooperation", True),
        ("東京は日本の首都である。", "日本", True),
        ("北京是中国的首都。", "中国的首都", True),
        ("北京是中国的首都。", "南京", False),
        ("ガラスの城", "カラス", False),
        ("เขาอยู่ที่กรุงเทพมหานคร", "กรุงเทพ", True),
        ("서울은 수도이다", "서울", True),
        ("राम दिल्ली में रहता है", "दिल्ली", True),
        ("राम दिल्ली में रहता है", "दिल", False),
        ("عاصمة مصر القاهرة.", "القاهرة", True),
        ("２０１９年", "2019", True),
        ("die STRASSE", "Straße", True),
        ("Beyonce\u0301 sang", "Beyoncé", True),
        ("Beyoncé sang", "Beyonce", False),
        ("the catalogue", "cat", False),
        ("a_b", "a_b", True),
        ("anything", "?!", False),
    ],
)
def test_answers_stand_in_passages(text, gold, holds):
    assert holds_answer(text, [gold]) is holds


def test_answers_are_compared_beyond_ascii():
    assert exact_match("1939–1945", ["1939-1945"]) == 1
    assert exact_match("Brann’s", ["brann's"]) == 1
    assert exact_match("“東京”。", ["東京"]) == 1
    assert exact_match("Beyonce\u0301", ["Beyoncé"]) == 1
    assert exact_match("東京都", ["東京"]) == 0
    assert f1("東京都", ["東京"]) == pytest.approx(0.8)
    assert f1("", ["a", "x"]) == 1
