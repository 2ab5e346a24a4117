"""The folder works alone: copied elsewhere, under another name, it records a reader there."""

import shutil
import subprocess
import sys
from pathlib import Path

import ragkit.attention

SCRIPT = """
import importlib.util
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from rows import observe, passage_scores, pooled, record
assert importlib.util.find_spec("ragkit") is None
config = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=4, attn_implementation="sdpa")
reader, ids = LlamaForCausalLM(config).eval(), torch.arange(3, 12)[None]
mask, rows = torch.ones_like(ids), torch.tensor([[8]])
seen = record(reader, ids, mask, rows)
tokens = pooled(lambda visit: observe(reader, ids, mask, rows, visit), torch.ones(1, 1, 1))
tokens, owner = tokens[1, :, 0, 0].mean((0, 1)), torch.tensor([-1] + [0] * 4 + [1] * 4)
scores = passage_scores(tokens, owner, 2)
print(list(seen.alpha.shape), list(scores.shape))
"""


def test_the_folder_records_without_the_rest(tmp_path):
    shutil.copytree(Path(ragkit.attention.__file__).parent, tmp_path / "rows")
    (tmp_path / "script.py").write_text(SCRIPT)
    # -I: neither the working folder nor PYTHONPATH; what is installed stays, but for ragkit itself
    hide = (
        "import sys; sys.path = [p for p in sys.path if 'ragkit' not in p]; "
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]; "
        "sys.path.insert(0, '.'); exec(open('script.py').read())"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", hide],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2] == "[2, 1, 4, 1, 9] [2]"
