"""The command ``gpurms demo``: its options, and a run from text to picture."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import gpurms
from gpurms import info
from gpurms.demo import InputError, corpus, neighbours, output
from gpurms.demo.skipgram import Sampler
from gpurms.demo.train import Run, Settings, sampler_of, train

SUMMARY = "train word embeddings, show neighbours, draw a map"
DESCRIPTION = """\
Train word embeddings (skip-gram with negative sampling) with gpurms.RMSprop, on Python's own documentation or on a text
of yours. Both embedding tables get sparse gradients: a step touches only the rows of the words in its batch.

Prints the nearest neighbours of some words, and writes to the folder of --out:
  embeddings.npz  the checkpoint: vocabulary, both tables, state and configuration of the optimizer
  demo.png        the loss curve beside a map of the words
"""
EPILOG = """\
Ctrl-C ends the training early: the results so far are written and shown.
Exit status: 0 done; 2 bad arguments or input, with one line that says what; 130 ended by Ctrl-C.
"""
N_NEAR = 6


def add_options(parser: argparse.ArgumentParser) -> None:
    """Make a parser that of the demo."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to train on (default: Python's own documentation)")
    add("--out", type=Path, metavar="DIR", default="gpurms-demo", help="folder for the files (default: %(default)s)")
    add("--words", type=_words, metavar="A,B,...", help="words to show neighbours of (default: chosen for the text)")
    numbers: tuple[tuple[str, type, float, float, str], ...] = (
        ("dim", int, 2, 4096, "length of an embedding"),
        ("window", int, 1, 100, "greatest distance between the words of a pair"),
        ("negatives", int, 1, 1000, "noise words that each pair is weighed against"),
        ("epochs", int, 1, 100_000, "passes over the text"),
        ("batch", int, 1, 1_000_000, "pairs in a step"),
        ("lr", float, 1e-6, 1, "learning rate at the start; it falls to a tenth"),
        ("min-count", int, 1, 1_000_000, "leave out words that occur less often"),
        ("subsample", float, 0, 1, "thin out words that make up more of the text than this; 0 does not"),
        ("seed", int, 0, 2**32 - 1, "seed of all random numbers"),
    )
    for name, kind, low, high, what in numbers:
        default = getattr(Settings, name.replace("-", "_"))
        span = f"{low:g} to {high:,}"
        add(
            f"--{name}",
            type=_within(kind, low, high, span),
            metavar="N" if kind is int else "X",
            default=default,
            help=f"{what} ({span}; default: %(default)s)",
        )


def run(options: argparse.Namespace) -> int:
    """Do what the options say; returns the exit status."""
    started = time.monotonic()
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    place = _place()
    _import_extras()
    text, probes = _read(options, settings)
    sampler = sampler_of(text, settings)
    output.prepare(options.out)

    _describe(options, settings, text, place)
    trained = _train(sampler, settings)
    if trained.interrupted:
        print(
            f"gpurms demo: interrupted after {trained.steps:,} of {trained.planned:,} steps; results so far follow",
            file=sys.stderr,
        )
    _show(options, settings, text, probes, trained)
    print(f"\n{time.monotonic() - started:.0f} s in all")
    return 130 if trained.interrupted else 0


def _read(options: argparse.Namespace, settings: Settings) -> tuple[corpus.Corpus, list[int]]:
    built_in = options.text is None
    texts = corpus.python_documentation() if built_in else [corpus.read_text(options.text)]
    text = corpus.build(texts, settings.min_count, _source(options))
    return text, neighbours.choose_probes(text, options.words, built_in)


def _source(options: argparse.Namespace) -> str:
    if options.text is None:
        return "Python's documentation"
    return str(options.text).encode(errors="backslashreplace").decode()  # names of files need not be Unicode


def _place() -> str:
    """Where the arrays will be, in words."""
    try:
        library = gpurms.array_module().__name__
        return f"{library} arrays, {info.engine().name} engine"
    except (RuntimeError, ValueError) as error:  # a backend or an engine that was asked for and is not to be had
        raise InputError(str(error)) from error


def _import_extras() -> None:
    """Fail before the work rather than after it."""
    try:
        for name in ("picture", "progress"):
            importlib.import_module(f"gpurms.demo.{name}")
    except ImportError as error:
        install = "pip install matplotlib scikit-learn tqdm"
        raise InputError(f"needs the packages of the extra 'demo': {install} ({error})") from error


def _describe(options: argparse.Namespace, settings: Settings, text: corpus.Corpus, place: str) -> None:
    n_words = len(text.vocabulary)
    print(f"text       {_source(options)}: {len(text.tokens):,} words, {n_words:,} of them distinct")
    print(f"model      two tables of {n_words:,} x {settings.dim}, {place}", flush=True)


def _train(sampler: Sampler, settings: Settings) -> Run:
    from gpurms.demo import progress

    with progress.training(settings.epochs * sampler.n_tokens) as bar:
        return train(sampler, settings, bar)


def _show(
    options: argparse.Namespace, settings: Settings, text: corpus.Corpus, probes: list[int], trained: Run
) -> None:
    from gpurms.demo import picture

    output.save_checkpoint(options.out / output.CHECKPOINT, text, settings, trained)
    vectors = neighbours.unit_vectors(trained.model)
    groups = neighbours.find(text, vectors, probes, N_NEAR)
    title = f"Word embeddings of {_source(options)}, trained by gpurms.RMSprop"
    with output.replacing(options.out / output.PICTURE) as file:
        picture.draw(file, text, vectors, groups, trained, title)
    print(f"\n{neighbours.table(text, groups)}\n")
    for name, what in ((output.CHECKPOINT, "checkpoint"), (output.PICTURE, "picture")):
        print(f"{what:10} {options.out / name}")


def _within(kind: type, low: float, high: float, span: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value: float = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected {'an integer' if kind is int else 'a number'} from {span}; got {text!r}"
            )
        return value

    return parse


def _words(text: str) -> list[str]:
    found = [word.strip().lower() for word in text.split(",") if word.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"expected words separated by commas; got {text!r}")
    return found
