"""Files: a folder that can be written to, and a checkpoint in NumPy's format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any

import numpy as np

from gpurms.demo import InputError
from gpurms.demo.corpus import Corpus
from gpurms.demo.train import Run, Settings

CHECKPOINT = "embeddings.npz"
PICTURE = "demo.png"


def prepare(folder: Path) -> None:
    """Make the folder, and a file in it, so that a run does not fail when its work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _cannot_write(folder, error) from error
    for name in (CHECKPOINT, PICTURE):
        if (folder / name).is_dir():
            raise InputError(f"cannot write {folder / name}: it is a folder")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of ``path`` once it is complete."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
        os.replace(part, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def save_checkpoint(path: Path, corpus: Corpus, settings: Settings, run: Run) -> None:
    """Write vocabulary, tables and optimizer; nothing in the file needs pickle.

    ``vocabulary``, ``counts``, ``input`` and ``output`` have a row for each word; ``optimizer_weight_0``, ``_1``, ...
    are ``get_weights()`` in order; ``optimizer_config`` and ``settings`` are JSON.
    """
    arrays: dict[str, Any] = {
        "vocabulary": np.array(corpus.vocabulary),
        "counts": corpus.counts,
        "input": run.model.input.numpy(),
        "output": run.model.output.numpy(),
        "optimizer_config": np.array(json.dumps(run.optimizer.get_config())),
        "settings": np.array(json.dumps(asdict(settings))),
    }
    for i, weight in enumerate(run.optimizer.get_weights()):
        arrays[f"optimizer_weight_{i}"] = weight
    with replacing(path) as file:
        np.savez(file, **arrays)


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write to {path}: {error.strerror or error}")
