"""A token belongs to the word that it ends in."""

import re

import numpy as np

from ragkit.data.corpus import Passage
from ragkit.experiment.analysis import Analysis
from ragkit.indicators.measures import Tokens


def cut(text):
    return [(*found.span(), found.group()) for found in re.finditer(r"\w+|\S", text)]


def test_a_token_belongs_to_the_word_that_it_ends_in():
    texts = [[("Ada", "Ada Mott sang."), ("", "No.")], [("Old Tarn", "Tarn, a town")]]
    owner, question = np.array([0, 0, 0, 0, 1, 0, 0, 0, 0]), np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    title = np.array([1, 0, 0, 0, 0, 1, 0, 0, 0], dtype=bool)
    ends = np.array([2, 5, 7, 13, 1, 8, 3, 4, -1])  # the last one is not known
    tokens = Tokens(
        ids=owner, owner=owner, title=title, question=question, from_end=owner, ends=ends,
        contribution=np.zeros((9, 3, 2, 1), np.float32), mass=np.zeros((2, 3, 6), np.float32),
    )  # fmt: skip
    analysis = Analysis.__new__(Analysis)
    analysis.found = [[Passage("", *text) for text in given] for given in texts]
    analysis.tokens = lambda which, titles: tokens if titles else tokens.texts
    plain = ["Mott", "Mott", ".", "No", "Tarn", ",", "unknown"]
    assert analysis.by_word("fine-tuned", cut) == plain
    every = ["Ada", *plain[:4], ":", *plain[4:]]
    assert analysis.by_word("fine-tuned", cut, titles=True) == every
