"""Command line of the benchmarks.

A suite is a package of this one that names its questions in ``QUESTIONS``; a question is a module of the suite with
``run(quick) -> Answer``. Nothing of a question is imported before it is asked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from bench import machine, report

SUITES = ("cpu",)
RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Ask the questions, print each answer as it comes, write the files; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure gpurms beside its peers in one run.")
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds: does it run? Judges no goal")
    parser.add_argument("--only", action="append", metavar="NAME", help="ask this question; may be repeated")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write here; without it only complete runs are written, to results/"
    )
    arguments = parser.parse_args(argv)
    questions = import_module(f"bench.{arguments.suite}").QUESTIONS
    if unknown := set(arguments.only or ()) - set(questions):
        parser.error(f"--only must be one of {', '.join(questions)}; got {', '.join(sorted(unknown))}")
    chosen = [name for name in questions if not arguments.only or name in arguments.only]

    described = machine.describe()
    print(report.machine_line(described), flush=True)
    answers = []
    for name in chosen:
        answer = import_module(f"bench.{arguments.suite}.{name}").run(arguments.quick)
        answers.append(answer if not arguments.quick else report.unjudged(answer))
        print("\n" + report.as_text(answers[-1]), flush=True)
    print("\n" + report.verdict(answers))

    folder = arguments.out or (None if arguments.quick or arguments.only else RESULTS)
    if folder is not None:
        for path in report.write(folder, arguments.suite, arguments.quick, described, answers):
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
