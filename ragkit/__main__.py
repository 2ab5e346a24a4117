"""`python -m ragkit`: the commands; each ends in its result or in one sentence of what is wrong."""

import argparse
import logging
import os
import platform
import shutil
import sys
from pathlib import Path

import psutil

from ragkit.errors import RagkitError, StoreError
from ragkit.experiment import plan, run
from ragkit.experiment.lab import Lab, changed_profile
from ragkit.pages import course, reference, report
from ragkit.settings import asset

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
FIGURES = NOTEBOOKS.parent / "figures"
README = NOTEBOOKS.parent / "README.md"
log = logging.getLogger("ragkit")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def doctor() -> None:
    """Says whether this machine can run the companion."""
    memory, disk = psutil.virtual_memory().total / 2**30, shutil.disk_usage(".").free / 2**30
    rows = [
        ("Python", platform.python_version(), sys.version_info[:2] >= (3, 11)),
        ("cores", str(os.cpu_count()), (os.cpu_count() or 1) >= 2),
        ("memory", f"{memory:.0f} GiB", memory >= 4),
        ("free disk", f"{disk:.0f} GiB", disk >= 3),
        ("embedded reader", "here", (asset("reader") / "model.safetensors").is_file()),
    ]
    for name, value, fine in rows:
        say(f"{'ok ' if fine else 'BAD'}  {name:16} {value}")
    if not all(fine for _, _, fine in rows):
        raise RagkitError("Something above is not as it should be; lines marked BAD say what.")


def finished(lab: Lab) -> Lab:
    """A lab whose run has ended."""
    if not (lab.folder / "manifest.json").is_file():
        raise RagkitError(
            f"There is no finished run in {lab.folder}. First: python -m ragkit reproduce "
            f"--profile {lab.profile.name} --runs {lab.runs}"
        )
    return lab


def write_report(lab: Lab) -> None:
    """Writes the report, and says where the run differs from the reference."""
    index, compared = report.write(lab, FIGURES)
    log.info("report: %s", index)
    for line in compared:
        log.info("%s", line)


def copy_for_lab(runs: Path) -> Path:
    """Working copies of the notebooks, so that editing never touches the originals.

    Copies that are there are kept. They stand one folder nearer to the runs.
    """
    folder = runs / "lab"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"{error.strerror}: {error.filename}"
        raise StoreError(f"{folder} cannot be made ({why}). Choose another --runs.") from None
    for source in sorted(NOTEBOOKS.glob("*.ipynb")):
        copy = folder / source.name
        if copy.exists():
            log.info("kept     %s (remove it to get a fresh copy)", copy)
        else:
            text = source.read_text("utf8").replace('RUNS = \\"../runs\\"', 'RUNS = \\"..\\"')
            copy.write_text(text, "utf8")
    return folder


def judge(arguments: argparse.Namespace) -> None:
    """Judges a reader of one's own, says the verdict with its reasons, and writes the page."""
    from ragkit.pages import judge_page  # it loads torch, which no other command needs at once

    judge_page.write(
        arguments.reader, arguments.questions, arguments.nouns, arguments.space, arguments.out
    )


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ragkit", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="can this machine run it?")
    for name, what in (
        ("plan", "what a run would fetch, need and take"),
        ("reproduce", "every stage, every notebook, the report"),
        ("report", "write the report of a finished run again"),
        ("reference", "make a finished run the reference in figures/ and README"),
        ("course", "student and solution notebooks, tried on a finished run"),
        ("tidy", "remove what a profile's run does not need any more"),
        ("lab", "working copies of the notebooks"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--profile", default="tiny", help="a shipped profile or a YAML file")
        command.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept")
        command.add_argument(
            "--set", action="append", default=[], dest="changes", metavar="KEY=VALUE",
            help="change a value of the profile; the run gets a folder of its own",
        )  # fmt: skip
    judged = commands.add_parser("judge", help="is a reader of your own fit to teach a retriever?")
    judged.add_argument("reader", help="a folder, a hub name, or 'embedded'")
    judged.add_argument("questions", help="JSONL with question, answer and passages")
    judged.add_argument("--nouns", default="en_core_web_sm", help="a spaCy pipeline or its folder")
    judged.add_argument("--space", help="the reader whose embeddings measure closeness")
    judged.add_argument("--out", type=Path, default=Path("judgement.html"), help="the page")
    return parser


def do(arguments: argparse.Namespace) -> None:
    """Runs one command."""
    if arguments.command == "doctor":
        doctor()
        return
    if arguments.command == "judge":
        judge(arguments)
        return
    if arguments.command == "lab":
        say(str(copy_for_lab(arguments.runs)))
        return
    lab = Lab(changed_profile(arguments.profile, arguments.changes), arguments.runs)
    if arguments.command == "plan":
        say("\n".join(plan.lines(plan.make(lab))))
    elif arguments.command == "reproduce":
        if run.reproduce(lab, NOTEBOOKS):
            write_report(lab)
    elif arguments.command == "report":
        write_report(finished(lab))
    elif arguments.command == "reference":
        reference.publish(finished(lab), FIGURES, README)
    elif arguments.command == "course":
        log.info("course: %s", course.write(NOTEBOOKS, finished(lab).folder, arguments.profile))
    else:
        log.info("%d old stages removed", run.tidy(lab, NOTEBOOKS))


def main() -> int:
    """Parses the command line; every problem that the user can mend ends as one sentence."""
    arguments = command_line().parse_args()
    run.start_logging()
    try:
        do(arguments)
    except KeyboardInterrupt:
        log.error("Stopped. What was finished is kept; the same command goes on from there.")
        return 130
    except Exception as error:
        # The attention room stands alone; by its name its error is known without loading torch.
        if not isinstance(error, RagkitError) and type(error).__name__ != "AttentionError":
            raise
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
