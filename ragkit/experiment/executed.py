"""Notebooks as stages: executed by papermill, remembered with what they opened and drew.

An execution is kept in `<run>/stages/notebook/<key>`: the notebook with its outputs, its figures,
and a record of its source, its profile, the code it reaches, the libraries, and every stage it
opened. It holds as long as all of these are the same.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import nbformat

from ragkit import errors
from ragkit.data.files import file_hash, write_whole
from ragkit.errors import NotebookError
from ragkit.experiment.lab import FIGURES, OPENED, Lab, read_json
from ragkit.experiment.provenance import PACKAGE, closure, provenance, versions
from ragkit.experiment.store import RECORD, contents, difference, read_record, without_free

log = logging.getLogger(__name__)
DRAWN_WITH = ("pandas", "matplotlib", "seaborn", "papermill", "nbclient", "ipykernel")
OWN_ERRORS = {*vars(errors), "AttentionError"}


def told(home: Path, status: str) -> dict[str, Any]:
    """What a stage or notebook says of itself, for the manifest, and what happened to it now."""
    kept = ("kind", "seconds", "peak_mib", "units", "made")
    saved = {key: value for key, value in read_json(home / RECORD).items() if key in kept}
    return saved | {"status": status}


def kernel_of_here(folder: Path, name: str, env: dict[str, str]) -> str:
    """Writes a kernel that runs this interpreter and this package; returns its name.

    A `python3` kernel that somebody else installed may run another Python; where several processes
    work as one, a kernel is none of them. It logs nothing: a cell's errors stand in the notebook.
    """
    place = folder / "kernels" / name
    place.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    env = {"PYTHONPATH": path, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "-1", **env}
    quiet = ["ipykernel_launcher", "--log-level=CRITICAL", "-f", "{connection_file}"]
    spec = {"argv": [sys.executable, "-m", *quiet], "display_name": name, "language": "python"}
    write_whole(place / "kernel.json", json.dumps(spec | {"env": env}))
    others = os.environ.get("JUPYTER_PATH", "").split(os.pathsep)
    if str(folder) not in others:
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(folder), *others]))
    return name


class Notebooks:
    """The notebooks of a run, those in `sources`; the run's stages must be made. `homes` and
    `status` say by name where the executions lie and what happened to them."""

    def __init__(self, lab: Lab, sources: Path) -> None:
        self.lab, self.sources = lab, sorted(sources.glob("[0-9A]*.ipynb"))
        self.homes, self.status = dict[str, Path](), dict[str, str]()
        if not self.sources:
            raise NotebookError(f"No notebooks in {sources}. Run this from a checkout.")

    def record(self, source: Path) -> dict[str, Any]:
        """What an execution depends on besides the stages that it opens."""
        cells = nbformat.read(source, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        profile = without_free(self.lab.profile.model_dump(mode="json", exclude={"name"}))
        own = {"its source": file_hash(source), **closure(code)}
        return {"profile": profile, "code": own, "versions": versions(DRAWN_WITH)}

    def state(self, source: Path) -> tuple[Path | None, str]:
        """The folder of an execution that holds; if there is none, why not the newest."""
        record, reasons = self.record(source), {"": "not made yet"}
        keys = {stage.key for stage in self.lab.stages}  # a variation opens many under its own name
        for home in self.lab.folder.glob("stages/notebook/*"):
            saved = read_record(home)
            if saved is None or saved["name"] != source.stem:
                continue
            was = saved["record"]
            opened = {n: pair for n, pair in was.get("inputs", {}).items() if pair[1] in keys}
            now = record | {"inputs": opened}
            if was == now and contents(home) == saved["files"]:
                return home, ""
            reason = "its files are damaged or missing" if was == now else difference(was, now)
            reasons[saved["made"]["when"]] = reason
        return None, reasons[max(reasons)]

    def run(self, source: Path) -> None:
        """Executes a notebook aside and keeps it with its figures, if no execution holds."""
        (home, reason), name, place = self.state(source), source.stem, self.lab.folder / "partial"
        self.status[name] = f"ran: {reason}" if home is None else "reused"
        if home is not None:
            self.homes[name] = home
            log.info("reused   notebook %s", name)
            return
        log.info("running  notebook %s (%s)", name, reason)
        folder, noted = place / f"notebook-{name}", place / f"{name}.opened"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "figures").mkdir(parents=True)
        noted.write_text("")
        record, started = self.record(source), time.monotonic()
        self.execute(source, folder, {OPENED: str(noted), FIGURES: str(folder / "figures")})
        seconds = round(time.monotonic() - started, 1)
        pairs = map(json.loads, noted.read_text("utf8").splitlines())
        record["inputs"] = {stage: [stage, key] for stage, key in pairs}
        key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:20]
        saved = {"name": name, "kind": "notebook", "record": record, "seconds": seconds}
        saved |= {"units": {"notebooks": 1}, "made": provenance(), "files": contents(folder)}
        write_whole(folder / RECORD, json.dumps(saved, indent=1))
        home = self.homes[name] = self.lab.folder / "stages" / "notebook" / key
        shutil.rmtree(home, ignore_errors=True)  # damaged
        home.parent.mkdir(exist_ok=True)
        folder.rename(home)
        log.info("done     notebook %s in %.0f s", name, seconds)

    def execute(self, source: Path, folder: Path, env: dict[str, str]) -> None:
        """Runs a notebook; what goes wrong ends as one sentence that names notebook and cell."""
        import papermill  # it takes a second, and a run with nothing to do need not wait for it
        from nbclient.exceptions import DeadKernelError
        from papermill.exceptions import PapermillExecutionError

        profile, out = (self.lab.folder / "profile.yaml").resolve(), folder / source.name
        given = {"PROFILE": str(profile), "RUNS": str(self.lab.runs.resolve())}
        # papermill only warns about a parameter that a notebook does not know
        for unknown in given.keys() - papermill.inspect_notebook(str(source)).keys():
            advice = "give it a line in its cell tagged 'parameters'"
            raise NotebookError(f"{source.name} does not know the parameter {unknown}: {advice}.")
        kernels, name = self.lab.folder / "partial" / "jupyter", f"ragkit-{source.stem}"
        options = {"kernel_name": kernel_of_here(kernels, name, env), "progress_bar": False}
        try:
            papermill.execute_notebook(str(source), str(out), given, **options)
        except DeadKernelError:
            raise NotebookError(
                f"Notebook {source.name}: its Python process was killed, most likely because memory"
                " ran out. Close other programs, then give the same command: it goes on from there."
            ) from None
        except PapermillExecutionError as error:
            where = f"Notebook {source.name}, cell {error.exec_count}"
            if error.ename in OWN_ERRORS:  # they speak for themselves
                raise NotebookError(f"{where}: {error.evalue}") from None
            first = next(filter(None, map(str.strip, error.source.splitlines())), "")
            raise NotebookError(
                f"{where} ({first!r}): {error.ename}: {error.evalue}\n"
                f"The notebook with its traceback: {out}"
            ) from None

    def publish(self) -> None:
        """Lays the notebooks with their outputs, and all their figures, into the run's folder."""
        for part, below in (("notebooks", "*.ipynb"), ("figures", "figures/*")):
            aside = self.lab.folder / f"{part}.new"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            for home in self.homes.values():
                for file in home.glob(below):
                    shutil.copy(file, aside)
            shutil.rmtree(self.lab.folder / part, ignore_errors=True)
            aside.rename(self.lab.folder / part)
