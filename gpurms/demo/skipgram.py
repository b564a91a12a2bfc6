"""Skip-gram with negative sampling: pairs of neighbouring words, and the gradients of two tables in closed form.

Source: T. Mikolov, I. Sutskever, K. Chen, G. Corrado, J. Dean, "Distributed Representations of Words and Phrases and
their Compositionality" (2013), arXiv:1310.4546. Unlike there, the noise words of a batch are shared by its pairs, which
turns their dot products into a matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import gpurms
from gpurms.demo import InputError
from gpurms.demo.corpus import Corpus, IntArray

Array = Any  # numpy.ndarray or cupy.ndarray

NOISE_WORDS = 64
"""Noise words drawn for a batch."""
NOISE_POWER = 0.75
"""Noise words are drawn in proportion to this power of their counts."""
BLOCK = 1 << 20
"""Tokens whose pairs are made and shuffled at once, to bound memory for long texts."""


class Sampler:
    """Random batches of pairs and noise words, drawn on the host.

    Args:
        corpus: the text.
        window: greatest distance of a pair; each centre draws its own, uniform in [1, window].
        batch: pairs per batch.
        subsample: words of a greater share of the text than this are left out at random, with ``f`` the share kept
            with probability ``sqrt(subsample/f) + subsample/f``; 0 keeps all.
        seed: of all random numbers.

    Raises:
        InputError: there are no pairs.

    ``expected_batches`` is the number of batches of an epoch, but for chance.
    """

    def __init__(self, corpus: Corpus, window: int, batch: int, subsample: float, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.n_tokens = len(corpus.tokens)
        self.n_words = len(corpus.vocabulary)
        self._corpus = corpus
        self._window = window
        self._batch = batch
        share = corpus.counts / corpus.counts.sum()
        self._keep = np.sqrt(subsample / share) + subsample / share if subsample else np.ones(len(share))
        noise = np.cumsum(corpus.counts**NOISE_POWER)
        self._noise = noise / noise[-1]
        first = slice(0, min(BLOCK, self.n_tokens))
        centers, _ = self._pairs(first, np.random.default_rng(0))
        self.expected_batches = int(np.ceil(len(centers) * self.n_tokens / first.stop / batch))
        if not self.expected_batches:
            raise InputError("too few words to train on: no two of them are left in one paragraph")

    def epoch(self) -> Iterator[tuple[IntArray, IntArray, IntArray, int]]:
        """Batches of (centres (n,), contexts (n,), noise (NOISE_WORDS,), tokens of the text done with them)."""
        for start in range(0, self.n_tokens, BLOCK):
            block = slice(start, min(start + BLOCK, self.n_tokens))
            centers, contexts = self._pairs(block, self.rng)
            n_pairs = len(centers)
            for at in range(0, n_pairs, self._batch):
                end = min(at + self._batch, n_pairs)
                noise = np.searchsorted(self._noise, self.rng.random(NOISE_WORDS), side="right").astype(np.int32)
                done = start + (block.stop - start) * end // n_pairs
                yield centers[at:end], contexts[at:end], noise, done

    def _pairs(self, block: slice, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        tokens = self._corpus.tokens[block]
        kept = rng.random(len(tokens)) < self._keep[tokens]
        pairs = skip_grams(tokens[kept], self._corpus.paragraphs[block][kept], self._window, rng)
        order = rng.permutation(len(pairs[0]))
        return pairs[0][order], pairs[1][order]


def skip_grams(
    tokens: IntArray, paragraphs: IntArray, window: int, rng: np.random.Generator
) -> tuple[IntArray, IntArray]:
    """Centres and contexts of all pairs of a text, none across the border of a paragraph.

    >>> rng = np.random.default_rng(0)
    >>> skip_grams(np.array([5, 6, 7]), np.array([0, 0, 1]), 1, rng)
    (array([5, 6]), array([6, 5]))
    """
    reach = rng.integers(1, window + 1, len(tokens))
    centers, contexts = [tokens[:0]], [tokens[:0]]
    for distance in range(1, min(window, len(tokens) - 1) + 1):
        left, right = slice(None, -distance), slice(distance, None)
        together = paragraphs[left] == paragraphs[right]
        for center, context in ((left, right), (right, left)):
            paired = together & (reach[center] >= distance)
            centers.append(tokens[center][paired])
            contexts.append(tokens[context][paired])
    return np.concatenate(centers), np.concatenate(contexts)


class SkipGram:
    """The table of centres and the table of contexts, float32, shape (n_words, dim), on ``gpurms.array_module()``.

    The loss of a pair with rows ``v`` of the centre, ``u`` of the context and ``w`` of the noise words is
    ``-log s(v.u) - negatives * mean(log s(-v.w))`` with ``s(x) = 1/(1 + exp(-x))``.
    """

    def __init__(self, n_words: int, dim: int, negatives: int, rng: np.random.Generator) -> None:
        xp = gpurms.array_module()
        start = (rng.random((n_words, dim), np.float32) - np.float32(0.5)) / np.float32(dim)
        self.input = gpurms.Variable(xp.asarray(start), name="input")
        self.output = gpurms.Variable(xp.zeros((n_words, dim), np.float32), name="output")
        self.negatives = negatives
        self._xp = xp

    def gradients(
        self, centers: IntArray, contexts: IntArray, noise: IntArray
    ) -> tuple[Array, list[tuple[gpurms.IndexedSlices, gpurms.Variable]]]:
        """Mean loss of the pairs, as a 0-d array, and the gradients of its sum, for ``apply_gradients``."""
        xp = self._xp
        centers, contexts, noise = xp.asarray(centers), xp.asarray(contexts), xp.asarray(noise)
        v, u, w = self.input.value[centers], self.output.value[contexts], self.output.value[noise]
        weight = self.negatives / len(noise)

        near_loss, near = softplus(xp, -(v * u).sum(axis=1))  # (n,)
        far_loss, far = softplus(xp, v @ w.T)  # (n, NOISE_WORDS)
        near, far = -near[:, None], weight * far
        loss = (near_loss.sum() + weight * far_loss.sum()) / len(v)

        into_output = xp.concatenate([near * v, far.T @ v])
        output_rows = xp.concatenate([contexts, noise])
        return loss, [
            (gpurms.IndexedSlices(near * u + far @ w, centers), self.input),
            (gpurms.IndexedSlices(into_output, output_rows), self.output),
        ]


def softplus(xp: Any, x: Array) -> tuple[Array, Array]:
    """``log(1 + exp(x))`` and its derivative ``1/(1 + exp(-x))``, without overflow."""
    e = xp.exp(-xp.abs(x))
    return xp.maximum(x, 0) + xp.log1p(e), 0.5 + 0.5 * xp.tanh(0.5 * x)
