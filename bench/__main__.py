"""Command line of the benchmarks.

A suite is a package of this one: ``QUESTIONS`` names its questions, each a module of the suite; ``problem()`` says why
it cannot run here, ``describe()`` what it runs on, ``ask(name, quick, described)`` answers. Nothing of a question is
imported before it is asked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from bench import chart, report

SUITES = ("cpu", "gpu", "torch")
RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Ask the questions, print and write each answer as it comes; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure gpurms beside its peers in one run.")
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds: does it run? Judges no goal")
    parser.add_argument("--only", action="append", metavar="NAME", help="ask this question; may be repeated")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write here; without it only complete runs are written, to results/"
    )
    arguments = parser.parse_args(argv)
    suite, quick = import_module(f"bench.{arguments.suite}"), arguments.quick
    if unknown := set(arguments.only or ()) - set(suite.QUESTIONS):
        parser.error(f"--only must be one of {', '.join(suite.QUESTIONS)}; got {', '.join(sorted(unknown))}")
    chosen = [name for name in suite.QUESTIONS if not arguments.only or name in arguments.only]
    if problem := suite.problem():
        print(f"python -m bench {arguments.suite}: {problem}", file=sys.stderr)
        return 2

    described = suite.describe()
    print(report.machine_line(described), flush=True)
    folder = arguments.out or (None if quick or arguments.only else RESULTS)
    answers, written = [], []
    for name in chosen:
        answer = suite.ask(name, quick, described)
        answers.append(report.unjudged(answer) if quick else answer)
        print("\n" + report.as_text(answers[-1]), flush=True)
        if folder is not None:  # after every answer: a run that is killed leaves what it has
            written = report.write(folder, arguments.suite, quick, described, answers)
    if folder is not None and (drawn := chart.draw(folder / report.stem(arguments.suite, described), answers)):
        written = [*report.write(folder, arguments.suite, quick, described, answers, drawn.markdown), *drawn.paths]

    print("\n" + report.summary(answers))
    print(report.verdict(answers))
    for path in written:
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
