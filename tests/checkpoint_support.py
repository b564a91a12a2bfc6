"""A training run on variables of all types and layouts, dense and sparse, whose every step can be repeated."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpurms import IndexedSlices, RMSprop, Variable
from tests.cases import LAYOUTS
from tests.engines import Engine
from tests.support import BFLOAT16, assert_same_bits

KINDS: tuple[tuple[tuple[int, ...], Any, str], ...] = (  # shape, type, layout
    ((5,), np.float32, "C"),
    ((), np.float64, "C"),
    ((3, 4), np.float16, "F"),
    ((2, 3, 2), BFLOAT16, "transposed"),
    ((0, 2), np.float32, "C"),
    ((3, 4), np.float32, "strided"),
    ((7,), np.float64, "backwards"),
    ((6, 2), np.float32, "C"),  # the sparse one
)


class Run:
    """An optimizer and its variables on one library; the first variable is a plain array."""

    def __init__(self, library: Engine, opt: RMSprop, seed: int = 0) -> None:
        self.engine = library
        self.opt = opt
        normal = np.random.default_rng(seed).standard_normal
        arrays = [library.put(LAYOUTS[layout](normal(shape).astype(dtype))) for shape, dtype, layout in KINDS]
        self.variables = [arrays[0], *(Variable(array, f"v{i}") for i, array in enumerate(arrays[1:], 1))]

    def step(self, number: int) -> None:
        """The step of that number, the same in every run; even ones leave a variable out."""
        rng = np.random.default_rng(1000 + number)
        grads: list[Any] = [(rng.integers(-24, 25, shape) / 8).astype(dtype) for shape, dtype, _ in KINDS]
        grads[1] = np.asarray(grads[1])
        grads[-1] = IndexedSlices(grads[-1], rng.integers(0, 6, 6))
        pairs = list(zip(map(self.engine.put, grads), self.variables))
        self.opt.apply_gradients(pairs[::-1] if number % 2 else pairs[:3] + pairs[4:])

    def steps(self, start: int, stop: int) -> "Run":
        for number in range(start, stop):
            self.step(number)
        return self


def assert_same_runs(run: Run, other: Run) -> None:
    assert_same_state(run.opt, run.variables, other.opt, other.variables)


def assert_same_state(opt: RMSprop, variables: Sequence[Any], other: RMSprop, others: Sequence[Any]) -> None:
    """All that a checkpoint holds agrees, to the bit."""
    assert other.get_config() == opt.get_config()
    assert other.get_slot_names() == opt.get_slot_names()
    for x, y in zip([*opt.weights, *variables], [*other.weights, *others], strict=True):
        assert_same_bits(y, x)
    assert owners(other, others) == owners(opt, variables)


def owners(opt: RMSprop, variables: Sequence[Any]) -> list[tuple[int, str]]:
    """The variable and the name of each slot in `weights`."""
    places = {}
    for i, variable in enumerate(variables):
        for name in opt.get_slot_names():
            try:
                places[id(opt.get_slot(variable, name))] = (i, name)
            except KeyError:
                continue
    return [places[id(slot)] for slot in opt.weights[1:]]


def small(**options: Any) -> tuple[RMSprop, list[Variable]]:
    """An optimizer and two variables after a step, all slots in use."""
    opt = RMSprop(0.1, **{"momentum": 0.5, "centered": True, **options})
    variables = [Variable(np.array([1.0, -2.0]), "a"), Variable(np.ones((3, 2), np.float32), "b")]
    opt.apply_gradients([(np.ones_like(v.value), v) for v in variables])
    return opt, variables


def like(variables: Sequence[Variable]) -> list[Variable]:
    """Variables of the same names, shapes and types, with other values."""
    return [Variable(np.full_like(v.value, 7), v.name) for v in variables]
