"""The training loop: one ``apply_gradients`` per batch, until the last epoch or Ctrl-C."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Self

import gpurms
from gpurms.demo.corpus import Corpus
from gpurms.demo.skipgram import Sampler, SkipGram

LOSS_EVERY = 50
"""Steps between two readings of the loss, which on a GPU wait for it."""
FINAL_RATE = 0.1
"""Learning rate at the end, as a part of the first."""


@dataclass(frozen=True)
class Settings:
    """What shapes a run; the command's options of the same names say what each means."""

    dim: int = 64
    window: int = 5
    negatives: int = 5
    epochs: int = 25
    batch: int = 1024
    lr: float = 0.02
    min_count: int = 5
    subsample: float = 1e-3
    seed: int = 0


@dataclass
class Run:
    """A trained model, with its optimizer and history.

    Attributes:
        losses: (step, mean loss of a pair over the steps since the entry before).
        planned: steps that the whole run was expected to take.
        interrupted: whether Ctrl-C ended it.
    """

    model: SkipGram
    optimizer: gpurms.RMSprop
    planned: int
    losses: list[tuple[int, float]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def steps(self) -> int:
        """Steps taken."""
        return int(self.optimizer.iterations.numpy())


class CtrlC:
    """Within this context Ctrl-C sets ``pressed``, so that it does not cut a step in half; pressed again it raises."""

    pressed = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


def sampler_of(corpus: Corpus, settings: Settings) -> Sampler:
    """The batches to train on; InputError if there are none."""
    return Sampler(corpus, settings.window, settings.batch, settings.subsample, settings.seed)


def train(sampler: Sampler, settings: Settings, bar: Any) -> Run:
    """Train on all batches; ``bar`` is a tqdm progress bar that counts the words of the text."""
    planned = settings.epochs * sampler.expected_batches
    model = SkipGram(sampler.n_words, settings.dim, settings.negatives, sampler.rng)
    schedule = gpurms.schedules.PolynomialDecay(settings.lr, planned, settings.lr * FINAL_RATE)
    # A long memory: rows of rare words are touched only now and then.
    run = Run(model, gpurms.RMSprop(schedule, rho=0.99), planned)
    with CtrlC() as ctrl_c:
        _train(run, sampler, settings.epochs, bar, ctrl_c)
    return run


def _train(run: Run, sampler: Sampler, epochs: int, bar: Any, ctrl_c: CtrlC) -> None:
    losses: list[Any] = []

    def report(words: int) -> None:
        run.losses.append((run.steps, float(sum(losses)) / len(losses)))
        losses.clear()
        bar.set_postfix(loss=f"{run.losses[-1][1]:.3f}", refresh=False)
        bar.update(words - bar.n)

    for epoch in range(epochs):
        for centers, contexts, noise, done in sampler.epoch():
            loss, grads_and_vars = run.model.gradients(centers, contexts, noise)
            step = run.optimizer.apply_gradients(grads_and_vars)
            losses.append(loss)
            if step % LOSS_EVERY == 0 or ctrl_c.pressed:
                report(epoch * sampler.n_tokens + done)
            if ctrl_c.pressed:
                run.interrupted = True
                return
    if losses:
        report(epochs * sampler.n_tokens)
