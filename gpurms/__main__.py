"""The command line: ``python -m gpurms`` or ``gpurms``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import gpurms
from gpurms import info
from gpurms.demo import InputError, command


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, _error(self.prog, message))


def _error(program: str, message: str) -> str:
    return f"{program}: error: {' '.join(message.split())}\n"


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="gpurms", description="RMSprop for NumPy and CuPy arrays.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"gpurms {gpurms.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command.add_options(commands.add_parser("demo", help=command.SUMMARY, allow_abbrev=False))
    info_parser = commands.add_parser("info", help=info.SUMMARY, description=info.SUMMARY, allow_abbrev=False)
    info_parser.set_defaults(run=_info)
    return parser


def _info(options: argparse.Namespace) -> int:
    print(info.report())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status, 130 after Ctrl-C. Bad arguments raise SystemExit(2)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not know all letters of a text
    try:
        options = _parser().parse_args(argv)
        status: int = options.run(options)
        sys.stdout.flush()
    except (InputError, MemoryError) as error:
        sys.stderr.write(_error("gpurms demo", str(error)))
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("gpurms: interrupted\n")
        return 130
    except BrokenPipeError:  # the reader of our output has left, as in `gpurms info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
