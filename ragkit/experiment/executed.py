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
from functools import cached_property
from pathlib import Path
from typing import Any

import nbformat

from ragkit import errors
from ragkit.data.files import file_hash, write_whole
from ragkit.errors import NotebookError
from ragkit.experiment.lab import FIGURES, OPENED, Lab
from ragkit.experiment.provenance import PACKAGE, closure, peak_memory, provenance, versions
from ragkit.experiment.store import RECORD, contents, difference, read_record, without_free

log = logging.getLogger(__name__)
DRAWN_WITH = ("pandas", "matplotlib", "seaborn", "papermill", "nbclient", "ipykernel")
OWN_ERRORS = {*vars(errors), "AttentionError"}
TOLD = ("kind", "seconds", "peak_mib", "units", "made")  # of a record, in the manifest


def kernel_of_here(folder: Path, name: str, env: dict[str, str]) -> str:
    """Writes a kernel that runs this interpreter and this package; returns its name.

    A `python3` kernel that somebody else installed may run another Python altogether. Where several
    processes work as one, a kernel is none of them.
    """
    env = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "-1", **env}
    place = folder / "kernels" / name
    place.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": name, "language": "python"}
    write_whole(place / "kernel.json", json.dumps({**spec, "env": {"PYTHONPATH": path, **env}}))
    others = os.environ.get("JUPYTER_PATH", "").split(os.pathsep)
    if str(folder) not in others:
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(folder), *others]))
    return name


def code_cells(source: Path) -> str:
    """A notebook's code as one text."""
    cells = nbformat.read(source, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


class Notebooks:
    """The notebooks of a run, those in `sources`; the run's stages must be made."""

    def __init__(self, lab: Lab, sources: Path) -> None:
        self.lab, self.sources = lab, sorted(sources.glob("[0-9]*.ipynb"))
        self.status: dict[str, str] = {}
        self.home = lab.folder / "stages" / "notebook"
        if not self.sources:
            raise NotebookError(
                f"There are no notebooks in {sources}. Run this from a checkout of the repository."
            )

    @cached_property
    def keys(self) -> set[str]:
        """The keys of the run's stages; a variation opens many of them under its own name."""
        return {stage.key for stage in self.lab.stages}

    def record(self, source: Path) -> dict[str, Any]:
        """What an execution depends on besides the stages that it opens."""
        profile = without_free(self.lab.profile.model_dump(mode="json"))
        return {
            "source": file_hash(source),
            "profile": {name: one for name, one in profile.items() if name != "name"},
            "code": closure(code_cells(source)),
            "versions": versions(DRAWN_WITH),
        }

    def why_not(self, home: Path, saved: dict[str, Any], record: dict[str, Any]) -> str | None:
        """Why an execution does not hold any more; None if it does."""
        if saved["record"] != record:
            return difference(saved["record"], record)
        for name, key in saved["opened"].items():
            if key not in self.keys:
                return f"{name} was made anew"
        return None if contents(home) == saved["files"] else "its files are damaged or missing"

    def state(self, source: Path) -> tuple[Path | None, str]:
        """The folder of an execution that holds; if there is none, why not the newest."""
        record, found = self.record(source), []
        for home in self.home.glob("*"):
            saved = read_record(home)
            if saved is not None and saved["name"] == source.stem:
                reason = self.why_not(home, saved, record)
                if reason is None:
                    return home, ""
                found.append((str(saved["made"]["when"]), reason))
        return None, max(found, default=("", "not made yet"))[1]

    def held(self, source: Path) -> Path:
        """The folder of the execution that holds; there must be one."""
        home, reason = self.state(source)
        if home is None:
            raise NotebookError(f"Notebook {source.stem} was run, and does not hold: {reason}.")
        return home

    def missing(self) -> list[Path]:
        """The notebooks that must be run."""
        for source in self.sources:
            home, reason = self.state(source)
            self.status[source.stem] = f"ran: {reason}" if home is None else "reused"
            if home is not None:
                log.info("reused   notebook %s", source.stem)
        return [source for source in self.sources if self.status[source.stem] != "reused"]

    def run(self, source: Path) -> None:
        """Executes one notebook aside and keeps it with its figures and what it opened."""
        record, reason = self.record(source), self.state(source)[1]
        self.status[source.stem] = f"ran: {reason}"
        log.info("running  notebook %s (%s)", source.stem, reason)
        folder = self.lab.folder / "partial" / f"notebook-{source.stem}"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "figures").mkdir(parents=True)
        opened = folder / "opened.jsonl"
        opened.touch()
        started = time.monotonic()
        peak_memory()  # counts from here on
        self.execute(source, folder, {OPENED: str(opened), FIGURES: str(folder / "figures")})
        seconds = round(time.monotonic() - started, 1)
        stages = dict(json.loads(line) for line in opened.read_text("utf8").splitlines())
        opened.unlink()
        saved = {
            "name": source.stem,
            "kind": "notebook",
            "record": record,
            "opened": stages,
            "seconds": seconds,
            "peak_mib": peak_memory(),
            "units": {"notebooks": 1},
            "made": provenance(),
            "files": contents(folder),
        }
        write_whole(folder / RECORD, json.dumps(saved, indent=1))
        text = json.dumps([record, stages], sort_keys=True)
        home = self.home / hashlib.sha256(text.encode()).hexdigest()[:20]
        shutil.rmtree(home, ignore_errors=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(home)
        log.info("done     notebook %s in %.0f s", source.stem, seconds)

    def execute(self, source: Path, folder: Path, env: dict[str, str]) -> None:
        """Runs a notebook; what goes wrong ends as one sentence that names notebook and cell."""
        import papermill  # it takes a second, and a run with nothing to do need not wait for it
        from nbclient.exceptions import DeadKernelError
        from papermill.exceptions import PapermillExecutionError

        runs = str(self.lab.runs.resolve())
        profile = str((self.lab.folder / "profile.yaml").resolve())
        parameters, out = {"PROFILE": profile, "RUNS": runs}, folder / source.name
        # papermill only warns about a parameter that a notebook does not know
        if unknown := sorted(set(parameters) - set(papermill.inspect_notebook(str(source)))):
            raise NotebookError(
                f"{source.name} does not know the parameter {', '.join(unknown)}: give it a line "
                "in its cell tagged 'parameters'."
            )
        kernels = self.lab.folder / "partial" / "jupyter"
        kernel = kernel_of_here(kernels, f"ragkit-{source.stem}", env)
        try:
            papermill.execute_notebook(
                str(source), str(out), parameters, kernel_name=kernel, progress_bar=False,
                log_output=False, extra_arguments=["--log-level=ERROR"],
            )  # fmt: skip
        except DeadKernelError:
            raise NotebookError(
                f"Notebook {source.name}: its Python process was killed, most likely because "
                "memory ran out. Close other programs or choose a smaller profile, then give the "
                "same command: what was finished is kept."
            ) from None
        except PapermillExecutionError as error:
            raise NotebookError(failure(source, out, error)) from None

    def publish(self) -> None:
        """Lays the notebooks with their outputs, and all their figures, into the run's folder."""
        for part, below in (("notebooks", "*.ipynb"), ("figures", "figures/*")):
            aside = self.lab.folder / f"{part}.new"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            for source in self.sources:
                for file in self.held(source).glob(below):
                    shutil.copy(file, aside)
            shutil.rmtree(self.lab.folder / part, ignore_errors=True)
            aside.rename(self.lab.folder / part)

    def records(self) -> dict[str, Any]:
        """What each notebook says of itself, and what happened to it now."""
        told: dict[str, Any] = {}
        for source in self.sources:
            saved = json.loads((self.held(source) / RECORD).read_text("utf8"))
            told[source.stem] = {name: saved[name] for name in TOLD}
            told[source.stem] |= {"status": self.status[source.stem]}
        return told


def failure(source: Path, out: Path, error: Any) -> str:
    """The sentence for a cell that raised: our own errors speak for themselves."""
    where = f"Notebook {source.name}, cell {error.exec_count}"
    if error.ename in OWN_ERRORS:
        return f"{where}: {error.evalue}"
    first = next((line.strip() for line in error.source.splitlines() if line.strip()), "")
    said = f"{where} ({first!r}): {error.ename}: {error.evalue}"
    return f"{said}\nThe notebook with its traceback: {out}"
