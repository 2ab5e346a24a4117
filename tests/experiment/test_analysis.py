"""A token belongs to the word that it ends in."""

import re

import numpy as np

from ragkit.data.corpus import Passage
from ragkit.experiment.analysis import Analysis
from ragkit.indicators.measures import Tokens


def cut(text):
    return [(*found.span(), found.group()) for found in re.finditer(r"\w+|\S", text)]


def test_a_token_belongs_to_the_word_that_it_ends_in():
    texts = [["Ada Mott sang.", "No."], ["Tarn, a town"]]
    owner, question = np.array([0, 0, 0, 0, 1, 0, 0, 0]), np.array([0, 0, 0, 0, 0, 1, 1, 1])
    ends = np.array([2, 5, 7, 13, 1, 3, 4, -1])  # the last one is not known
    tokens = Tokens(
        ids=owner, owner=owner, question=question, from_end=owner, ends=ends,
        contribution=np.zeros((8, 3, 2, 1), np.float32), mass=np.zeros((2, 3, 6), np.float32),
    )  # fmt: skip
    analysis = Analysis.__new__(Analysis)
    analysis.found = [[Passage("", "", text) for text in given] for given in texts]
    analysis.tokens = lambda which: tokens
    expected = ["Ada", "Mott", "Mott", ".", "No", "Tarn", ",", "unknown"]
    assert analysis.by_word("fine-tuned", cut) == expected
