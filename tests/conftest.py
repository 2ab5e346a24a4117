"""Fixtures that several test files share."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import filelock
import hypothesis
import pytest
from cells import defined

ROOT = Path(__file__).parent.parent
LONGEST_FIRST = ("test_notebooks", "test_paper", "test_graph", "test_judge", "test_run")
# Python reads it at its start: it notes which notebook's kernel begins to load which library.
NOTING = """
import os, sys
class Noting:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers") and os.environ.get("RAGKIT_FIGURES"):
            with open({noted!r}, "a") as file:
                print(name, os.environ["RAGKIT_FIGURES"], file=file)
sys.meta_path.insert(0, Noting())
"""
hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("unhurried")


def pytest_collection_modifyitems(items):
    """`make test` gives whole files to two processes: the longest begin."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def command(*arguments, **environment):
    """Runs the command line in the checkout."""
    return subprocess.run(
        [sys.executable, "-m", "ragkit", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture(scope="session")
def ragkit():
    """Runs the command line in the checkout."""
    return command


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The folder that holds a finished run of `smoke`, and `noted`: what its kernels loaded. It is
    made once for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    runs = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke-runs"
    with filelock.FileLock(f"{runs}.lock"):
        if not runs.is_dir():
            site = tmp_path_factory.mktemp("site")
            runs.mkdir()
            (site / "sitecustomize.py").write_text(NOTING.format(noted=str(runs / "noted")))
            path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
            given = os.path.relpath(runs, ROOT)  # as `make` gives it: a relative one
            first = command("reproduce", "--profile", "smoke", "--runs", given, PYTHONPATH=path)
            assert first.returncode == 0, first.stderr[-3000:]
            last = first.stderr.splitlines()[-1]  # how it compares with the reference comes last
            assert "too small to judge" in last
    return runs


@pytest.fixture(scope="session")
def ewt(tmp_path_factory):
    """The noun finder that `make nouns` trains on EWT dev; needs RAGKIT_REAL_DATA."""
    treebank = Path(os.environ["RAGKIT_REAL_DATA"]) / "ud" / "en_ewt-ud-dev.conllu"
    out = tmp_path_factory.mktemp("ewt") / "nouns"
    return defined("appendix/nouns", "nouns").write(treebank, out)


@pytest.fixture(scope="session")
def falcon(tmp_path_factory):
    """A small random Falcon (ALiBi, as Falcon-RW) with Falcon's own tokenizer."""
    import torch
    from transformers import FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("falcon")
    packed = Path(os.environ["RAGKIT_REAL_DATA"]) / "tokenizers" / "falcon.tokenizer.json.gz"
    file = folder / "tokenizer.json"
    file.write_bytes(gzip.decompress(packed.read_bytes()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        alibi=True, multi_query=False, parallel_attn=False, new_decoder_architecture=False,
    )  # fmt: skip
    FalconForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
