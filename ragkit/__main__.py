"""`python -m ragkit`: doctor, reproduce, report, lab."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from ragkit import RagkitError

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
log = logging.getLogger("ragkit")


def doctor() -> None:
    """Says whether this machine can run the companion."""
    import psutil
    import torch

    from ragkit.reader import embedded_reader

    memory, disk = psutil.virtual_memory().total / 2**30, shutil.disk_usage(".").free / 2**30
    rows = [
        ("Python", platform.python_version(), sys.version_info[:2] >= (3, 11)),
        ("torch", torch.__version__, True),
        ("cores", str(os.cpu_count()), (os.cpu_count() or 1) >= 2),
        ("memory", f"{memory:.0f} GiB", memory >= 4),
        ("free disk", f"{disk:.0f} GiB", disk >= 2),
        ("embedded reader", str(embedded_reader()), (embedded_reader() / "model.safetensors").is_file()),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none (not needed for tiny)", True),
    ]
    for name, value, fine in rows:
        sys.stdout.write(f"{'ok ' if fine else 'BAD'}  {name:16} {value}\n")
    if not all(fine for _, _, fine in rows):
        raise RagkitError("Something above is not as it should be; lines marked BAD say what.")


def reproduce(profile_name: str, runs: Path) -> None:
    """Runs the notebooks in order through papermill, each a remembered stage, then writes manifest and report."""
    from ragkit import report
    from ragkit.lab import Lab

    lab = Lab(profile_name, runs)
    started = time.monotonic()
    with lab.store.only_run():
        status = run_notebooks(lab, profile_name, runs)
        manifest = collect_manifest(lab, status, time.monotonic() - started)
        (lab.store.folder / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf8")
        index = report.write(lab.store.folder)
    log.info("report: %s (%.0f s)", index, time.monotonic() - started)


def run_notebooks(lab: Any, profile_name: str, runs: Path) -> dict[str, str]:
    """Executes every notebook whose source, upstream code or profile changed; returns what happened to each."""
    import hashlib

    import papermill

    from ragkit.lab import Lab
    from ragkit.store import code_of

    folder = lab.store.folder / "notebooks"
    folder.mkdir(exist_ok=True)
    package = sorted((Path(__file__).parent).glob("*.py"))
    code = {p.stem: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in package if p.stem in ("plots", "views", "claims", "metrics", "world", "corpus")}
    code |= code_of([Lab])
    status = {}
    for source in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        parameters = {"PROFILE": profile_name, "RUNS": str(runs.resolve())}
        known = papermill.inspect_notebook(str(source))
        if unknown := set(parameters) - set(known):
            raise RagkitError(f"{source.name}: its parameters cell does not know {sorted(unknown)}.")
        record = {"source": hashlib.sha256(source.read_bytes()).hexdigest(), "profile": lab.profile.model_dump(mode="json"), "code": code}
        done, stamp = folder / source.name, folder / f"{source.stem}.json"
        if done.is_file() and stamp.is_file() and json.loads(stamp.read_text("utf8"))["record"] == record:
            log.info("reused   notebook %s", source.stem)
            status[source.stem] = "reused"
            continue
        log.info("running  notebook %s", source.stem)
        started, partial = time.monotonic(), folder / f"{source.stem}.partial"
        environment = dict(os.environ)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(NOTEBOOKS.parent), environment.get("PYTHONPATH", "")])
        papermill.execute_notebook(
            str(source), str(partial), parameters, kernel_name="python3", progress_bar=False, log_output=False, cwd=str(lab.store.folder)
        )
        partial.replace(done)
        seconds = round(time.monotonic() - started, 1)
        stamp.write_text(json.dumps({"record": record, "seconds": seconds}), "utf8")
        log.info("done     notebook %s in %.0f s", source.stem, seconds)
        status[source.stem] = f"ran in {seconds} s"
    return status


def collect_manifest(lab: Any, notebooks: dict[str, str], seconds: float) -> dict[str, Any]:
    """What was run, from what, on what, and how long each stage took."""
    import psutil
    import torch

    stages = {}
    for file in sorted((lab.store.folder / "stages").rglob("stage.json")):
        saved = json.loads(file.read_text("utf8"))
        stages[str(file.parent.relative_to(lab.store.folder / "stages"))] = {"key": saved["key"], "seconds": saved["seconds"]}
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=NOTEBOOKS.parent, capture_output=True, text=True, check=False)
    return {
        "profile": lab.profile.model_dump(mode="json"),
        "git": git.stdout.strip() or "not a git checkout",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy", "scipy", "faiss-cpu", "papermill")},
        "python": platform.python_version(),
        "machine": {
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "threads": torch.get_num_threads(),
        },
        "peak_memory_mib_of_a_notebook": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        "seconds_of_this_call": round(seconds, 1),
        "notebooks": notebooks,
        "stages": stages,
    }


def copy_for_lab(runs: Path) -> None:
    """Working copies of the notebooks, so that editing them never touches the originals; edited copies are kept."""
    folder = runs / "lab"
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not (folder / source.name).exists():
            shutil.copy(source, folder / source.name)
    sys.stdout.write(f"{folder}\n")


def main() -> int:
    """Parses the command line; every RagkitError ends as one sentence, without a traceback."""
    parser = argparse.ArgumentParser(prog="ragkit", description=__doc__)
    parser.add_argument("command", choices=["doctor", "reproduce", "report", "lab"])
    parser.add_argument("--profile", default="tiny", help="a shipped profile or a path to a YAML file")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("papermill", "httpx", "bm25s", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        if arguments.command == "doctor":
            doctor()
        elif arguments.command == "reproduce":
            reproduce(arguments.profile, arguments.runs)
        elif arguments.command == "report":
            from ragkit import report
            from ragkit.profile import load_profile

            log.info("report: %s", report.write(arguments.runs / load_profile(arguments.profile).name))
        else:
            copy_for_lab(arguments.runs)
    except RagkitError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        log.error("Stopped. What was finished is kept; the same command goes on from there.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
