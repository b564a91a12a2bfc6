"""Every CUDA program that the library can ask for, as the library itself writes it: compiled here, never launched.

A case says what a call is given; `programs` makes the call on arrays of no memory and takes down what it compiles.
Cases are a covering set: any two choices (a type, a flag, a layout, ...) meet in a case. More is not needed, as no
line of the kernels depends on more than two of them together: a conversion on compute type and element type, a term of
the rule on its flag and the one around it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations, count, cycle, product
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from gpurms.kernels.rule import FLOAT32, FLOAT64, SCALARS, Flags, Rule, Update, compute_dtype
from tests.cases import RULES
from tests.device_support import cupy, cupy_on_cpu
from tests.support import BFLOAT16, DTYPES

from gpurms.kernels import cuda, cuda_norm, cuda_rows  # isort: skip - they import CuPy
from tests.device import launch as device_launch  # isort: skip

FLOAT16 = np.dtype(np.float16)
TYPES = [(var, grad) for var in DTYPES for grad in ((var, FLOAT32, FLOAT64) if var in (FLOAT16, BFLOAT16) else (var,))]
"""Variables and their gradients."""


class Program(NamedTuple):
    """A text for NVRTC, and what it is for."""

    case: str
    source: str
    options: tuple[str, ...]


class Case(NamedTuple):
    """A variable's share of a call; sparse if it has ids."""

    types: tuple[np.dtype, np.dtype] = (FLOAT32, FLOAT32)
    slot: np.dtype = FLOAT32
    mixed: bool = False  # the other slots have other types
    flags: Flags = Flags()
    layout: str = "packed"
    ids: np.dtype | None = None
    n_rows: int = 100
    sum_only: bool = False
    live: bool = False  # scalars in device memory

    def __str__(self) -> str:
        on = "+".join(name for name, value in self.flags._asdict().items() if value)
        ids = "" if self.ids is None else f", {self.ids} ids of {self.n_rows} rows"
        what = "sums of rows" if self.sum_only else f"{self.slot}{' and other' * self.mixed} slots, {on}"
        return "{} with gradients {}".format(*self.types) + f", {what}, {self.layout}{ids}"


# -------------------------------------------------------------------------------------------------------- cases


def covering(factors: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Choices of one value per factor such that any two values of two factors meet in one of them.

    Greedy: each row begins with a pair that has not met yet; every other factor then takes the value that lets the
    most new pairs meet.
    """
    names = list(factors)
    pending = {
        frozenset(((a, i), (b, j)))
        for a, b in combinations(names, 2)
        for i, j in product(range(len(factors[a])), range(len(factors[b])))
    }
    rows = []
    while pending:
        row = dict(min(pending, key=sorted))
        for name in names:
            if name not in row:
                gains = [
                    sum(frozenset(((name, i), other)) in pending for other in row.items())
                    for i in range(len(factors[name]))
                ]
                row[name] = gains.index(max(gains))
        pending -= {frozenset(pair) for pair in combinations(row.items(), 2)}
        rows.append({name: factors[name][row[name]] for name in names})
    return rows


def _flags(row: dict[str, Any]) -> Flags:
    """The flags of a row of choices; two decays, and Nesterov without momentum, are no rules."""
    on = {name: row[name] for name in Flags._fields if name in row}
    decay = {"l2": row["decay"] == "l2", "decoupled": row["decay"] == "decoupled"}
    momentum = {"has_momentum": row["momentum"] != "none", "nesterov": row["momentum"] == "nesterov"}
    return Flags(**on, **decay, **momentum)


FLAGS = {name: [False, True] for name in Flags._fields}
FLAGS = {name: values for name, values in FLAGS.items() if name not in ("l2", "decoupled", "has_momentum", "nesterov")}
FLAGS |= {"decay": ["none", "l2", "decoupled"], "momentum": ["none", "plain", "nesterov"]}


def flags_of(options: dict[str, Any]) -> Flags:
    """The flags of one of the rules that are tested everywhere, as the optimizer makes them."""
    from gpurms import RMSprop
    from gpurms.step import read

    return read(RMSprop(**options), 0).rule(FLOAT32, options.get("momentum", 0) > 0).flags


def dense_cases() -> list[Case]:
    """All contiguous: every rule in float32, and the covering set."""
    rules = {flags_of(options): None for options in RULES.values()}
    rows = covering({"types": TYPES, "slot": list(DTYPES), "mixed": [False, True], **FLAGS})
    return [
        *(Case(flags=flags) for flags in rules),
        *(Case(row["types"], row["slot"], row["mixed"], _flags(row)) for row in rows),
    ]


def strided_cases() -> list[Case]:
    """For a kernel per layout of its arrays, in which only types and flags are the library's."""
    rules = [Flags(), _all_on("l2"), _all_on("decoupled")]
    rows = covering({"types": TYPES, "flags": rules, "live": [False, True]})
    slots = cycle(DTYPES)
    return [Case(row["types"], next(slots), False, row["flags"], "strided", live=row["live"]) for row in rows]


def _all_on(decay: str) -> Flags:
    return Flags(*[True] * len(Flags._fields))._replace(**{"l2": False, "decoupled": False, decay: True})


ROW_LAYOUTS = ["packed", "plain", "1-d rows", "2-d rows"]


def sparse_cases() -> list[Case]:
    """Every layout of rows, key type and id type; sums of rows alone, too."""
    numbers = {"ids": [np.dtype(np.int32), np.dtype(np.int64)], "n_rows": [100, 1 << 32]}
    rows = covering(
        {"types": TYPES, "slot": list(DTYPES), "mixed": [False, True], "layout": ROW_LAYOUTS, **numbers, **FLAGS}
    )
    cases = [
        Case(row["types"], row["slot"], row["mixed"], _flags(row), row["layout"], row["ids"], row["n_rows"])
        for row in rows
    ]
    layouts = cycle(["packed", "plain"])
    sums = [Case(types, layout=next(layouts), ids=np.dtype(np.int32), sum_only=True) for types in TYPES]
    return [*cases, *sums]


# ----------------------------------------------------------------------------------------- what the library compiles


class _Kernels:
    """Stands for the kernels of a program that nobody compiles: it has them all."""

    def __contains__(self, name: str) -> bool:
        return True

    def __getitem__(self, name: str) -> Any:
        return SimpleNamespace(name=name)


@contextmanager
def recorded(case: Any, found: dict[str, Program]) -> Iterator[None]:
    """Take down the programs that are asked for, and launch nothing."""

    def module(source: str, options: tuple[str, ...]) -> Any:
        found.setdefault(source, Program(str(case), source, options))
        return SimpleNamespace(kernels=_Kernels())

    with cupy_on_cpu() as machine, mock.patch.object(device_launch, "_module", module):
        machine.execute = lambda *launch, **options: None
        yield


_addresses = count(1 << 40, 1 << 32)


def phony(shape: tuple[int, ...], dtype: np.dtype, strides: tuple[int, ...] | None = None, past: int = 0) -> Any:
    """An array of no memory, `past` elements past a multiple of 4 GiB."""
    memory = cupy.cuda.UnownedMemory(next(_addresses), 1 << 50, None, 0)
    pointer = cupy.cuda.MemoryPointer(memory, past * dtype.itemsize)
    return cupy.ndarray(shape, dtype, pointer, strides)


SHAPES = {
    "packed": (64,),
    "plain": (63,),
    "1-d rows": (64,),
    "2-d rows": (8, 8),
}


def _array(case: Case, dtype: np.dtype) -> Any:
    """The variable of a case, or a slot."""
    if case.ids is None:
        return phony((1000,), dtype, None if case.layout == "packed" else (2 * dtype.itemsize,))
    shape = SHAPES[case.layout]
    strides = None
    if case.layout.endswith("rows"):  # elements two apart
        strides = [2 * dtype.itemsize]
        for length in reversed(shape):
            strides.insert(0, length * strides[0])
    return phony((case.n_rows, *shape), dtype, None if strides is None else tuple(strides))


def update_of(case: Case) -> Update:
    """What a case asks of the kernels."""
    var_type, grad_type = case.types
    rule = Rule(case.flags, np.zeros(len(SCALARS), compute_dtype(var_type)), {} if case.live else None)
    names = ["rms"] * (not case.sum_only) + ["mom"] * case.flags.has_momentum + ["mg"] * case.flags.centered
    first = DTYPES.index(case.slot)
    slot_types = {name: DTYPES[(first + i * case.mixed) % len(DTYPES)] for i, name in enumerate(names)}
    slots = {"rms": None, "mom": None, "mg": None} | {name: _array(case, slot_types[name]) for name in names}
    n_ids = 2 * cuda_rows.TILE
    shape = (1000,) if case.ids is None else (n_ids, *SHAPES[case.layout])
    ids = None if case.ids is None else phony((n_ids,), case.ids)
    factors = phony((4,), rule.compute)
    factor = cuda_norm.Factor(factors, 1, None) if case.flags.has_factor else None
    return Update(_array(case, var_type), **slots, rule=rule, grad=phony(shape, grad_type), indices=ids, factor=factor)


def _step(case: Case) -> None:
    update = update_of(case)
    if case.ids is not None:
        cuda_rows.find_outside([(update.indices, case.n_rows)])
    if case.sum_only:
        cuda_rows.add_rows(update.var, update.indices, update.grad, update.rule.compute)
    else:
        cuda.Plan([update])()


def _norms(grad_type: np.dtype, compute: np.dtype, clipvalue: float | None) -> None:
    sums = cuda_norm.square_sums([phony((200_000,), grad_type)], [compute], clipvalue)
    cuda_norm.clip_factors(sums, 1.0, True)


def programs(kind: str) -> list[Program]:
    """The programs of `multi`, `rows` and `sort`, `norm`, or `strided` arrays and their scalars."""
    found: dict[str, Program] = {}
    if kind == "norm":
        for var, grad in TYPES:
            for clipvalue in (None, 1.0):
                with recorded(f"norm of {grad} for {var}", found):
                    _norms(grad, compute_dtype(var), clipvalue)
    else:
        cases = {"multi": dense_cases, "rows": sparse_cases, "strided": strided_cases}
        for case in cases[kind]():
            with recorded(case, found):
                _step(case)
    return list(found.values())
