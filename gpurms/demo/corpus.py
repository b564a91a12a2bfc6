"""Text as numbered words: Python's own documentation, or a file of the user's."""

from __future__ import annotations

import ast
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpurms.demo import InputError

IntArray = np.ndarray[Any, np.dtype[np.int32]]

SKIPPED = {"__pycache__", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}
"""Folders of the standard library that hold tests, or other people's packages."""
MIN_DISTINCT = 20
MIN_WORDS = 1000

# Letters with an inner apostrophe ("don't"), without a possessive s: "the list's" counts as "list".
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019](?!s\b)[^\W\d_]+)?")
_BLANK_LINES = re.compile(r"\n\s*\n")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Corpus:
    """Words as numbers, the most frequent word being 0.

    Attributes:
        vocabulary: the distinct words.
        counts: how often each occurs, shape (n_words,).
        tokens: the text, shape (n_tokens,).
        paragraphs: number of the paragraph of each token, ascending, shape (n_tokens,).
    """

    vocabulary: list[str]
    counts: IntArray
    tokens: IntArray
    paragraphs: IntArray


def words(text: str) -> list[str]:
    """The words of a text in lower case; single letters are mostly names of variables and are left out.

    >>> words("Don't read a file's 2nd line_no twice.")
    ["don't", 'read', 'file', 'nd', 'line', 'no', 'twice']
    """
    return [word for word in _WORD.findall(text.lower()) if len(word) > 1]


def build(texts: list[str], min_count: int, source: str) -> Corpus:
    """Number the words that occur at least ``min_count`` times; ``source`` is named in errors.

    Paragraphs end at blank lines. Rarer words are taken out, as if they had not been written.
    """
    split = [part for text in texts for part in _BLANK_LINES.split(text)]
    counter: Counter[str] = Counter()
    for part in split:
        counter.update(words(part))
    vocabulary = [word for word, count in counter.most_common() if count >= min_count]
    counts = np.array([counter[word] for word in vocabulary], np.int32)
    if len(vocabulary) < MIN_DISTINCT or counts.sum() < MIN_WORDS:
        raise InputError(
            f"{source}: too few words to train on: {counts.sum():,} words, {len(vocabulary):,} of them distinct, occur "
            f"at least {min_count} times each; expected {MIN_WORDS:,} and {MIN_DISTINCT} or more"
        )
    number = {word: i for i, word in enumerate(vocabulary)}
    numbered = [[number[word] for word in words(part) if word in number] for part in split]
    tokens = np.array([token for part in numbered for token in part], np.int32)
    lengths = [len(part) for part in numbered]
    return Corpus(vocabulary, counts, tokens, np.repeat(np.arange(len(split), dtype=np.int32), lengths))


def read_text(path: Path) -> str:
    """A file of UTF-8 text."""
    try:
        if path.exists() and not (path.is_file() or path.is_fifo()):
            raise InputError(f"{path}: expected a text file; got a {'folder' if path.is_dir() else 'device'}")
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not data.strip():
        raise InputError(f"{path}: expected text; the file is empty")
    if b"\0" in data:
        raise InputError(f"{path}: expected UTF-8 text; byte {data.index(0):,} is NUL")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text; byte {error.start:,} is {data[error.start]:#04x}") from error


def python_documentation() -> list[str]:
    """The help topics of Python's ``help()``, then the docstrings of the standard library.

    The same Python gives the same list. Docstrings come from the source files: nothing is imported or run.
    """
    from pydoc_data.topics import topics

    texts = list(topics.values())
    for path in _library_files(sysconfig.get_path("stdlib")):
        texts.extend(_docstrings(path))
    return texts


def _library_files(folder: str) -> Iterator[Path]:
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - SKIPPED)
        yield from (Path(at, name) for name in sorted(files) if name.endswith(".py"))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escape sequences in somebody else's source
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text
