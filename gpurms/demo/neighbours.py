"""Which words ended up close to which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpurms.demo import InputError
from gpurms.demo.corpus import Corpus, IntArray
from gpurms.demo.skipgram import SkipGram

FloatArray = np.ndarray[Any, np.dtype[np.float32]]

PROBES = (
    "file", "directory", "list", "dictionary", "string", "integer", "class", "module",
    "error", "thread", "socket", "server", "time", "encoding", "color", "test",
)  # fmt: skip
"""The words to look at in Python's documentation."""
N_PROBES = 16
FREQUENT = 1500
"""Neighbours are looked for among this many of the most frequent words: rare ones have seen too little text."""
EVERYWHERE = 0.1
"""Words in more than this part of all stretches, such as "the" and "if", are no one's neighbours."""
STRETCH = 16
"""Tokens in which a word counts once when asking how evenly it is spread."""


@dataclass(frozen=True)
class Group:
    """A word and its nearest neighbours, as numbers of the vocabulary; ``cosines`` belong to ``near``."""

    probe: int
    near: IntArray
    cosines: FloatArray


def unit_vectors(model: SkipGram) -> FloatArray:
    """One vector of length 1 for each word: the sum of its rows in both tables, less the mean of the frequent words.

    The sum brings together words that occur beside each other and words that occur in like company; the mean is a
    direction that all words share and that says nothing about any of them.
    """
    vectors = model.input.numpy() + model.output.numpy()
    vectors -= vectors[:FREQUENT].mean(axis=0)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.finfo(np.float32).tiny), np.float32)


def find(corpus: Corpus, vectors: FloatArray, probes: list[int], n_near: int) -> list[Group]:
    """The neighbours of each probe, nearest first."""
    candidates = _candidates(corpus)
    groups = []
    for probe in probes:
        others = candidates[candidates != probe]
        cosines = vectors[others] @ vectors[probe]
        best = np.argsort(-cosines, kind="stable")[:n_near]
        groups.append(Group(probe, others[best], cosines[best]))
    return groups


def choose_probes(corpus: Corpus, words: list[str] | None, built_in: bool) -> list[int]:
    """Numbers of the user's words; else of ``PROBES`` for the built-in text; else of words typical of the text."""
    number = {word: i for i, word in enumerate(corpus.vocabulary)}
    if words is not None:
        if missing := [word for word in words if word not in number]:
            raise InputError(f"--words: not among the {len(number):,} words of the text: {', '.join(missing)}")
        return [number[word] for word in dict.fromkeys(words)]
    if built_in:
        return [number[word] for word in PROBES if word in number]
    return _typical(corpus)


def table(corpus: Corpus, groups: list[Group]) -> str:
    """The groups as text, one line each, with counts and cosines."""
    rows = [
        [
            corpus.vocabulary[group.probe],
            f"{corpus.counts[group.probe]:,}",
            *(f"{corpus.vocabulary[i]} {cosine:.2f}" for i, cosine in zip(group.near, group.cosines)),
        ]
        for group in groups
    ]
    first, second, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    first, second = max(first, len("word")), max(second, len("count"))
    lines = [f"{'word':{first}}  {'count':>{second}}  nearest words, with cosine"]
    for word, count, *near in rows:
        cells = (cell.ljust(width) for cell, width in zip(near, others))
        lines.append("  ".join([word.ljust(first), count.rjust(second), *cells]).rstrip())
    return "\n".join(lines)


def _stretch_share(corpus: Corpus) -> FloatArray:
    """Share of all stretches of the text in which each word occurs."""
    n_words, n_tokens = len(corpus.vocabulary), len(corpus.tokens)
    stretch = np.arange(n_tokens, dtype=np.int64) // STRETCH
    places = np.unique(stretch * n_words + corpus.tokens)
    occurrences = np.bincount(places % n_words, minlength=n_words)
    return np.asarray(occurrences / (stretch[-1] + 1), np.float32)


def _candidates(corpus: Corpus) -> IntArray:
    wanted = _stretch_share(corpus) <= EVERYWHERE
    wanted[FREQUENT:] = False
    found = np.flatnonzero(wanted)
    return (found if len(found) else np.arange(len(wanted))).astype(np.int32)


def _typical(corpus: Corpus) -> list[int]:
    """Frequent words that come in clusters: in fewer stretches than if their occurrences were strewn at random."""
    random_share = 1 - (1 - corpus.counts / corpus.counts.sum()) ** STRETCH
    score = corpus.counts * np.log(random_share / _stretch_share(corpus))
    candidates = _candidates(corpus)
    return sorted(candidates[np.argsort(-score[candidates], kind="stable")[:N_PROBES]].tolist())
