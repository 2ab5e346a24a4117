"""Fixtures that several test files share."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from ud import read_conllu

from ragkit.indicators.nouns import train_tagger

ROOT = Path(__file__).parent.parent
LONGEST_FIRST = (
    "test_notebooks",
    "test_paper",
    "test_faults",
    "test_fleet",
    "test_judge",
    "test_nouns",
)
hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("unhurried")


def pytest_collection_modifyitems(items):
    """`make test` gives whole files to two processes: the longest begin."""
    items.sort(
        key=lambda item: (
            LONGEST_FIRST.index(item.path.stem)
            if item.path.stem in LONGEST_FIRST
            else len(LONGEST_FIRST)
        )
    )


@pytest.fixture(scope="session")
def ragkit():
    """Runs the command line in the checkout."""
    return lambda *arguments: subprocess.run(
        [sys.executable, "-m", "ragkit", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def smoke(tmp_path_factory, ragkit):
    """The folder that holds a finished run of `smoke`."""
    runs = tmp_path_factory.mktemp("runs")
    first = ragkit(
        "reproduce", "--profile", "smoke", "--runs", os.path.relpath(runs, ROOT)
    )  # as `make` gives it: a relative one
    assert first.returncode == 0, first.stderr[-3000:]
    assert (
        "profile smoke is too small to judge" in first.stderr.splitlines()[-1]
    )  # how it compares with the reference comes last
    return runs


@pytest.fixture(scope="session")
def ewt(tmp_path_factory):
    """A noun finder for real text, trained on EWT dev as it is and lower-cased; needs RAGKIT_REAL_DATA."""
    sentences = read_conllu(Path(os.environ["RAGKIT_REAL_DATA"]) / "ud" / "en_ewt-ud-dev.conllu")
    return train_tagger(
        [(s.words, s.tags) for s in [*sentences, *(s.lower() for s in sentences)]],
        tmp_path_factory.mktemp("ewt"),
        seed=0,
    )
