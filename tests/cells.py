"""What notebooks define in their own cells, for tests."""

from pathlib import Path
from types import SimpleNamespace

import nbformat

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def defined(stem, part, **names):
    """What the code cells of a notebook define whose ids begin with `part`, with the notebook's
    imports and the `names` given."""
    cells = nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4).cells
    imports = [
        line
        for cell in cells[:4]
        if cell.cell_type == "code"
        for line in cell.source.splitlines()
        if line.startswith(("import ", "from "))
    ]
    exec("\n".join(imports), names)
    for cell in cells:
        if cell.id.startswith(part) and cell.cell_type == "code":
            exec(compile(cell.source, cell.id, "exec"), names)
    return SimpleNamespace(**names)
