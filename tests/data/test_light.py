"""What a notebook that only reads results loads of this room: no torch, no transformers, no hub."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "tokenizers", "datasets", "spacy", "faiss")
LIGHT = ("text", "files", "corpus", "worlds", "speech")


@pytest.mark.parametrize("module", [f"ragkit.data.{name}" for name in LIGHT])
def test_a_light_module_loads_no_heavy_one(module):
    code = f"import sys, {module}; print(*(set({HEAVY!r}) & sys.modules.keys()))"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []
