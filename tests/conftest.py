"""Fixtures that several test files share."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def ragkit():
    """Runs the command line in the checkout."""
    return lambda *arguments: subprocess.run([sys.executable, "-m", "ragkit", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory, ragkit):
    """The folder that holds a finished run of `smoke`."""
    runs = tmp_path_factory.mktemp("runs")
    first = ragkit("reproduce", "--profile", "smoke", "--runs", str(runs))
    assert first.returncode == 0, first.stderr[-3000:]
    assert "profile smoke is too small to judge" in first.stderr.splitlines()[-1]  # how it compares with the reference comes last
    return runs
