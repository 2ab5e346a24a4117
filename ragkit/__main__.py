"""`python -m ragkit`: doctor, reproduce, report, reference, lab, course, judge."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import pkgutil
import platform
import resource
import shutil
import subprocess
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from ragkit.errors import NotebookError, RagkitError
from ragkit.experiment.workers import make_sets, start_logging

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
REFERENCE = NOTEBOOKS.parent / "figures"
log = logging.getLogger("ragkit")


def doctor() -> None:
    """Says whether this machine can run the companion."""
    import psutil
    import torch

    from ragkit.models.reader import embedded_reader

    memory, disk = psutil.virtual_memory().total / 2**30, shutil.disk_usage(".").free / 2**30
    rows = [
        ("Python", platform.python_version(), sys.version_info[:2] >= (3, 11)),
        ("torch", torch.__version__, True),
        ("cores", str(os.cpu_count()), (os.cpu_count() or 1) >= 2),
        ("memory", f"{memory:.0f} GiB", memory >= 4),
        ("free disk", f"{disk:.0f} GiB", disk >= 2),
        (
            "embedded reader",
            str(embedded_reader()),
            (embedded_reader() / "model.safetensors").is_file(),
        ),
        (
            "GPU",
            torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else "none (not needed for tiny)",
            True,
        ),
    ]
    for name, value, fine in rows:
        sys.stdout.write(f"{'ok ' if fine else 'BAD'}  {name:16} {value}\n")
    if not all(fine for _, _, fine in rows):
        raise RagkitError("Something above is not as it should be; lines marked BAD say what.")


def reproduce(profile_name: str, runs: Path, changes: list[str]) -> None:
    """Runs the notebooks in order through papermill, each a remembered stage, then writes manifest and report.

    Ends by saying where the run differs from the reference in `figures/`.
    """
    from ragkit.profile import load_profile, save_profile

    profile = load_profile(
        profile_name, changes
    )  # before the slow imports: a slip is named at once
    from ragkit.experiment.lab import Lab
    from ragkit.experiment.store import room_on_disk, write_whole
    from ragkit.pages import report

    lab = Lab(profile, runs)
    began, started = time.time(), time.monotonic()
    if (
        changes
    ):  # the notebooks and the processes beside this one read the profile as it was changed
        profile_name = str(lab.store.folder / "profile.yaml")
        save_profile(profile, Path(profile_name))
    with lab.store.only_run(), room_on_disk(lab.store.folder, "notebooks and report"):
        status = run_notebooks(lab, profile_name, runs)
        manifest = collect_manifest(lab, status, began, time.monotonic() - started)
        write_whole(lab.store.folder / "manifest.json", json.dumps(manifest, indent=1))
        index, compared = report.write(lab.store.folder, REFERENCE)
    log.info("report: %s (%.0f s)", index, time.monotonic() - started)
    for line in compared.lines():
        log.info("%s", line)


def run_notebooks(lab: Any, profile_name: str, runs: Path) -> dict[str, str]:
    """Executes every notebook whose source, upstream code, inputs or profile changed; returns what happened to each.

    They begin in order, on a CPU two at a time: every stage is made by then, and what a notebook itself works on needs one core.
    """
    from ragkit.experiment.kernels import stoppable
    from ragkit.experiment.lab import Lab
    from ragkit.experiment.store import code_of, file_hash, write_whole

    folder = lab.store.folder / "notebooks"
    folder.mkdir(exist_ok=True)
    used = (
        "plots",
        "views",
        "claims",
        "metrics",
        "measured",
        "world",
        "corpus",
        "analysis",
        "indicators",
        "monitor",
    )
    code = {name: file_hash(Path(__file__).parent / f"{name}.py")[:16] for name in used}
    code |= code_of([Lab])
    profile = str(Path(profile_name).resolve()) if Path(profile_name).is_file() else profile_name
    parameters = {"PROFILE": profile, "RUNS": str(runs.resolve())}
    inputs, sound = lab.inputs(), lab.store.sound()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH")])
    )
    sources = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    if not sources:
        raise NotebookError(
            f"There are no notebooks in {NOTEBOOKS}. Run this from a checkout of the repository, installed with pip install -e."
        )
    status, waiting = dict.fromkeys((source.stem for source in sources), "reused"), {}
    for source in sources:
        check_parameters(source, parameters)
        record = {
            "source": file_hash(source),
            "profile": lab.profile.model_dump(mode="json"),
            "inputs": inputs,
            "code": code,
        }
        if is_reusable(folder / source.name, folder / f"{source.stem}.json", record, sound):
            log.info("reused   notebook %s", source.stem)
        else:
            waiting[source] = record

    def run(source: Path) -> None:
        log.info("running  notebook %s", source.stem)
        started, unfinished, done = (
            time.monotonic(),
            lab.store.folder / "partial" / source.name,
            folder / source.name,
        )
        execute(source, unfinished, parameters)
        unfinished.replace(done)
        seconds = round(time.monotonic() - started, 1)
        stamp = {
            "record": waiting[source],
            "seconds": seconds,
            "hash": file_hash(done),
            "stages": lab.store.sound(),
        }
        write_whole(folder / f"{source.stem}.json", json.dumps(stamp))
        log.info("done     notebook %s in %.0f s", source.stem, seconds)
        status[source.stem] = f"ran in {seconds} s"

    if waiting:
        make_sets(profile, runs, list(lab.sets))
        stoppable(
            [partial(run, source) for source in waiting],
            2 if lab.profile.machine.device == "cpu" else 1,
        )
    return status


def check_parameters(source: Path, parameters: dict[str, str]) -> None:
    """papermill only warns about a parameter that a notebook does not know; here it is an error."""
    import papermill

    known = papermill.inspect_notebook(str(source))
    if unknown := sorted(set(parameters) - set(known)):
        raise NotebookError(
            f"{source.name} does not know the parameter {', '.join(unknown)}: give it a line in its cell tagged 'parameters'."
        )


def is_reusable(done: Path, stamp: Path, record: dict[str, Any], sound: dict[str, str]) -> bool:
    """Whether an executed notebook is whole, was made from just these things, and the stages it left are still there."""
    from ragkit.experiment.store import file_hash

    try:
        saved = json.loads(stamp.read_text("utf8"))
        return bool(
            saved["record"] == record
            and saved["hash"] == file_hash(done)
            and saved["stages"].items() <= sound.items()
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return False


def execute(source: Path, out: Path, parameters: dict[str, str]) -> None:
    """Runs one notebook; what goes wrong in it ends as one sentence that names notebook and cell."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            str(source), str(out), parameters,
            kernel_name="python3", progress_bar=False, log_output=False, extra_arguments=["--log-level=ERROR"],
        )  # fmt: skip
    except DeadKernelError:
        raise NotebookError(
            f"Notebook {source.name}: its Python process was killed, most likely because memory ran out. "
            "Close other programs or choose a smaller profile, then give the same command: what was finished is kept."
        ) from None
    except PapermillExecutionError as error:
        raise NotebookError(failure(source, out, error)) from None


def failure(source: Path, out: Path, error: Any) -> str:
    """The sentence for a cell that raised: our own errors speak for themselves, others are named with their cell."""
    where = f"Notebook {source.name}, cell {error.exec_count}"
    if error.ename in own_errors():
        return f"{where}: {error.evalue}"
    first = next((line for line in error.source.splitlines() if line.strip()), "")
    return f"{where} ({first.strip()!r}): {error.ename}: {error.evalue}\nThe notebook with its traceback: {out}"


def own_errors() -> set[str]:
    """Names of RagkitError and everything that the package derives from it."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)], "ragkit."):
        importlib.import_module(module.name)
    waiting, names = [RagkitError], set()
    while waiting:
        kind = waiting.pop()
        names.add(kind.__name__)
        waiting += kind.__subclasses__()
    return names


def collect_manifest(
    lab: Any, notebooks: dict[str, str], began: float, seconds: float
) -> dict[str, Any]:
    """What was run, from what, on what, how long each stage took, and which of them were made since `began` (seconds since the epoch)."""
    import psutil
    import torch

    stages: dict[str, Any] = {}
    trimmed: dict[str, Any] = {}
    for name, saved in lab.store.records().items():
        home = lab.store.folder / "stages" / name
        made = (home / "stage.json").stat().st_mtime >= began
        stages[name] = {part: saved[part] for part in ("key", "seconds", "peak_mib", "work")} | {
            "this_call": "ran" if made else "reused"
        }
        if "trimmed.json" in saved["files"]:
            counts = json.loads((home / "trimmed.json").read_text("utf8"))
            trimmed |= {name: counts} if counts["trimmed"] else {}
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=NOTEBOOKS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "profile": lab.profile.model_dump(mode="json"),
        "git": git.stdout.strip() or "not a git checkout",
        "versions": {
            name: metadata.version(name)
            for name in ("torch", "transformers", "numpy", "scipy", "faiss-cpu", "papermill")
        },
        "python": platform.python_version(),
        "machine": {
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "threads": torch.get_num_threads(),
        },
        "peak_memory_mib_of_a_notebook": round(
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        ),
        "seconds_of_this_call": round(seconds, 1),
        "notebooks": notebooks,
        "trimmed_prompts": trimmed,
        "stages": stages,
    }


def copy_for_lab(runs: Path) -> None:
    """Working copies of the notebooks, so that editing them never touches the originals; copies already there are kept.

    Prints their folder, for the Makefile.
    """
    folder = runs / "lab"
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted(NOTEBOOKS.glob("*.ipynb")):
        copy = folder / source.name
        if copy.exists():
            log.info("kept     %s (remove it to get a fresh copy)", copy)
        else:  # the copy stands one folder nearer to the runs than its original
            copy.write_text(
                source.read_text("utf8").replace('RUNS = \\"../runs\\"', 'RUNS = \\"..\\"'), "utf8"
            )
    sys.stdout.write(f"{folder}\n")


def finished_run(profile_name: str, runs: Path) -> Path:
    """The folder of a profile's finished run."""
    from ragkit.profile import load_profile

    run = runs / load_profile(profile_name).name
    if not (run / "manifest.json").is_file():
        raise RagkitError(
            f"There is no finished run in {run}. First: python -m ragkit reproduce --profile {profile_name} --runs {runs}"
        )
    return run


def plan_run(profile_name: str, runs: Path, changes: list[str]) -> None:
    """Says what a run of a profile would fetch, need and take, and keeps the plan in the run's folder."""
    from ragkit.profile import load_profile

    profile = load_profile(
        profile_name, changes
    )  # before the slow imports: a slip is named at once
    os.environ["TQDM_DISABLE"] = "1"  # a hundred small measurements need no bar
    from ragkit import plan, plan_text

    ground = plan.Ground.of(profile)
    made = plan.make(ground, runs / profile.name)
    sys.stdout.write(plan_text.text(ground, made))
    log.info("the plan as numbers: %s", made.save(runs / profile.name))


def rewrite_report(profile_name: str, runs: Path) -> None:
    """Writes the report of a finished run again."""
    run = finished_run(profile_name, runs)  # before the slow imports: a slip is named at once
    from ragkit.experiment.store import room_on_disk
    from ragkit.pages import report

    with room_on_disk(run, "report"):
        index, compared = report.write(run, REFERENCE)
    log.info("report: %s", index)
    for line in compared.lines():
        log.info("%s", line)


def publish_reference(profile_name: str, runs: Path) -> None:
    """Makes a finished run the reference: figures, tables and manifest to `figures/`, the ledger's verdicts into the README."""
    run = finished_run(profile_name, runs)
    from ragkit.pages import reference

    reference.publish(run, REFERENCE, NOTEBOOKS.parent / "README.md")


def make_course(profile_name: str, runs: Path) -> None:
    """Writes student and solution notebooks and the lesson plan, tried on a profile's finished run."""
    run = finished_run(profile_name, runs)
    from ragkit.pages import course

    profile = str(Path(profile_name).resolve()) if Path(profile_name).is_file() else profile_name
    log.info("course: %s", course.write(NOTEBOOKS, run, profile))


def judge_reader(reader: str, questions: str, nouns: str, space: str | None, out: Path) -> None:
    """Judges a reader of one's own, says the verdict with its reasons, and writes the page."""
    if out.is_dir() or not out.absolute().parent.is_dir():  # before minutes of work
        raise RagkitError(
            f"The page cannot be written to {out}: it is a folder, or its folder is not there. Choose another place with --out."
        )
    from ragkit import judge
    from ragkit.pages.judge_page import write_html

    judged = judge(reader, questions, nouns, space)
    write_html(judged, out)
    for one in (*judged.checks, judged.direct):
        log.info("%-14s %s. %s", one.verdict, one.name, one.told)
    log.info(
        "verdict: %s (%d questions, %.0f s). The page: %s",
        judged.verdict,
        judged.questions,
        judged.seconds,
        out,
    )


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ragkit", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("doctor", "plan", "reproduce", "report", "reference", "lab", "course"):
        command = commands.add_parser(name)
        command.add_argument(
            "--profile", default="tiny", help="a shipped profile or a path to a YAML file"
        )
        command.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept")
        if name in ("plan", "reproduce"):
            command.add_argument(
                "--set",
                action="append",
                default=[],
                dest="changes",
                metavar="KEY=VALUE",
                help="change a value of the profile for this run",
            )
    judged = commands.add_parser("judge", help="is a reader of your own fit to teach a retriever?")
    judged.add_argument("reader", help="a folder, a hub name, or 'embedded'")
    judged.add_argument(
        "questions", help="JSONL with question, answer and passages, a few hundred lines"
    )
    judged.add_argument(
        "--nouns", default="en_core_web_sm", help="a spaCy pipeline, by name or folder"
    )
    judged.add_argument(
        "--space",
        help="the reader in whose input embeddings closeness is measured (default: the judged one)",
    )
    judged.add_argument(
        "--out", type=Path, default=Path("judgement.html"), help="where the page is written"
    )
    return parser


def main() -> int:
    """Parses the command line; every RagkitError ends as one sentence, without a traceback."""
    arguments = command_line().parse_args()
    start_logging()
    try:
        if arguments.command == "doctor":
            doctor()
        elif arguments.command == "plan":
            plan_run(arguments.profile, arguments.runs, arguments.changes)
        elif arguments.command == "reproduce":
            reproduce(arguments.profile, arguments.runs, arguments.changes)
        elif arguments.command == "report":
            rewrite_report(arguments.profile, arguments.runs)
        elif arguments.command == "reference":
            publish_reference(arguments.profile, arguments.runs)
        elif arguments.command == "course":
            make_course(arguments.profile, arguments.runs)
        elif arguments.command == "judge":
            judge_reader(
                arguments.reader,
                arguments.questions,
                arguments.nouns,
                arguments.space,
                arguments.out,
            )
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
