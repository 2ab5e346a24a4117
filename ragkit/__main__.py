"""`python -m ragkit`: the commands; each ends in its result or in one sentence of what is wrong."""

import argparse
import logging
import sys
from pathlib import Path

from ragkit.errors import RagkitError
from ragkit.experiment import plan, run
from ragkit.experiment.lab import Lab, changed_profile
from ragkit.pages import course, report

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
FIGURES, README = NOTEBOOKS.parent / "figures", NOTEBOOKS.parent / "README.md"
COMMANDS = {
    "plan": "what a run would fetch, need and take",
    "reproduce": "every stage, every notebook, the report",
    "report": "write the report of a finished run again",
    "reference": "make a finished run the reference in figures/ and README",
    "course": "student and solution notebooks, tried on a finished run",
    "tidy": "remove what a profile's run does not need any more",
}
log = logging.getLogger("ragkit")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ragkit", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        command.add_argument("--profile", default="tiny", help="a shipped profile or a YAML file")
        command.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept")
        changed = "change a value of the profile, KEY=VALUE; the run gets a folder of its own"
        command.add_argument("--set", action="append", default=[], dest="changes", help=changed)
    judged = commands.add_parser("judge", help="is a reader of your own fit to teach a retriever?")
    judged.add_argument("reader", help="a folder, a GGUF file, a hub name, or 'embedded'")
    judged.add_argument("questions", help="JSONL with question, answer and passages")
    judged.add_argument("--nouns", default="en_core_web_sm", help="a spaCy pipeline or its folder")
    judged.add_argument("--space", help="the reader whose embeddings measure closeness")
    judged.add_argument("--chat", action="store_true", help="ask by the reader's chat template")
    judged.add_argument("--out", type=Path, default=Path("judgement.html"), help="the page")
    return parser


def do(given: argparse.Namespace) -> None:
    """Runs one command."""
    if given.command == "judge":
        from ragkit.pages import judge  # it loads torch, which no other command needs at once

        asked = (given.reader, given.questions, given.nouns, given.space)
        return judge.write(*asked, given.out, given.chat)
    lab = Lab(changed_profile(given.profile, given.changes), given.runs)
    is_needed = given.command in ("report", "reference", "course")
    if is_needed and not (lab.folder / "manifest.json").is_file():
        first = f"python -m ragkit reproduce --profile {lab.profile.name} --runs {lab.runs}"
        raise RagkitError(f"There is no finished run in {lab.folder}. First: {first}")
    match given.command:
        case "plan":
            sys.stdout.write(plan.told(lab))
        case "tidy":
            log.info("%d old stages removed", run.tidy(lab, NOTEBOOKS))
        case "reference":
            report.make_reference(lab, FIGURES, README)
            if lab.base == "full":
                report.keep_outputs(lab, NOTEBOOKS)
        case "course":
            log.info("course: %s", course.write(NOTEBOOKS, lab.folder, given.profile))
        case "report" | "reproduce":
            if given.command == "report" or run.reproduce(lab, NOTEBOOKS):
                index, compared = report.write(lab, FIGURES)
                log.info("%s", "\n".join([f"report: {index}", *compared]))


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
