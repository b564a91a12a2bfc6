"""Dense variables: the rule, the types of storage, tables of several variables."""

from typing import Any

import numpy as np

from gpurms.kernels.rule import FLOAT32, FLOAT64, SCALARS, Flags, Update, compute_dtype
from tests.cuda_support import assert_updated, rule, update_on_cpu, update_on_gpu
from tests.device_support import cupy
from tests.mutation.machine import STEPS, device
from tests.support import BFLOAT16

from gpurms.kernels import cuda_norm  # isort: skip - it imports CuPy

FLOAT16 = np.dtype(np.float16)


def hard(n: int, seed: int, dtype: Any, positive: bool = False) -> np.ndarray:
    """Numbers of about 1, and some special ones."""
    x = np.random.default_rng(seed).standard_normal(n)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 0.8, -0.8, 0.8000001, -0.8000001, 3.0, -3.0, 1e-20, 65504.0]
    x[seed % 3 : 3 * len(special) : 3][: len(special)] = special[: len(x[seed % 3 : 3 * len(special) : 3])]
    with np.errstate(all="ignore"):
        return (abs(x) if positive else x).astype(dtype)


def shifted(array: np.ndarray, by: int) -> Any:
    """A copy on the device, `by` elements past a multiple of 512 bytes."""
    room = cupy.empty(array.size + by, array.dtype)
    room[by:] = cupy.array(array.ravel())
    return room[by:].reshape(array.shape)


def dense(
    flags: Flags,
    sizes: list[tuple[int, str]],
    types: tuple[Any, Any, Any] = (FLOAT32,) * 3,
    live: bool = False,
    skip: float | None = None,
    steps: int = STEPS,
) -> None:
    """Variables of these sizes in one call; of each, the arrays named are not aligned to 16 bytes."""
    var_type, grad_type, slot_type = map(np.dtype, types)
    with device(steps):
        the_rule = rule(flags, compute_dtype(var_type), {} if live else None)
        if skip is not None:
            the_rule = the_rule._replace(skip={0: cupy.array([skip], np.float32)})
        factors = hard(len(sizes), 7, the_rule.compute)[::-1].copy()
        on_device = cupy.array(factors)
        names = ["var", "grad", "rms"] + ["mom"] * flags.has_momentum + ["mg"] * flags.centered
        host, there = [], []
        for place, (n, unaligned) in enumerate(sizes):
            element = {"var": var_type, "grad": grad_type}
            arrays = {
                name: hard(n, 10 * place + i, element.get(name, slot_type), name == "rms")
                for i, name in enumerate(names)
            }
            copies = {name: shifted(array, int(name in unaligned.split())) for name, array in arrays.items()}
            empty = {name: None for name in ("mom", "mg") if name not in names}
            factor = factors[place] if flags.has_factor else None
            placed = cuda_norm.Factor(on_device, place, None) if flags.has_factor else None
            host.append(Update(**arrays, **empty, rule=the_rule, factor=factor))
            there.append(Update(**copies, **empty, rule=the_rule, factor=placed))
        update_on_gpu(there)
        if not skip:
            update_on_cpu(host)
        for got, want in zip(there, host):
            assert_updated(got, want)


ALL_ON = Flags(*[True] * 10)._replace(decoupled=False)
SMALL = [(150, "")]


def rule_with_everything() -> None:
    dense(ALL_ON._replace(eps_in_sqrt=False, lr_in_momentum=False), SMALL)


def rule_decoupled() -> None:
    dense(Flags(decoupled=True, has_momentum=True), SMALL)


def rule_centered() -> None:
    dense(Flags(centered=True, l2=True), SMALL)


def rule_clipped() -> None:
    dense(Flags(clip_value=True, eps_in_sqrt=False, lr_in_momentum=False), SMALL)


def rule_nesterov() -> None:
    dense(Flags(has_momentum=True, nesterov=True, maximize=True, has_factor=True), SMALL)


SEVERAL = [
    (1, ""),
    (1024, ""),
    (2500, ""),
    (3, ""),
    (1024, "var"),
    (1024, "grad"),
    (1024, "rms"),
    (1024, "mom"),
    (1024, "mg"),
    (1024, "var grad"),
    (1024, "grad rms"),
    (1023, ""),
    (2048, "grad mom"),
]


def several_variables() -> None:
    dense(Flags(has_momentum=True, centered=True, has_factor=True), SEVERAL)


def plain_variables() -> None:
    dense(Flags(), [(n, name) for n, name in SEVERAL if name not in ("mom", "mg")])


def scalars_on_the_device() -> None:
    dense(Flags(), [(40, "")], live=True)
    dense(Flags(), [(40, "")], (FLOAT64,) * 3, live=True)


def left_out() -> None:
    """The device knows whether the step happens."""
    for skip in (0.0, 1.0, -2.0):
        dense(Flags(), [(40, "")], skip=skip)


def replayed(ids: np.ndarray | None) -> None:
    """Parameters have the scalars of another step than the device: those on the device count."""
    shape = (8, 2)
    values = np.random.default_rng(2).standard_normal(shape if ids is None else (len(ids), 2)).astype(np.float32)
    host = [abs(np.random.default_rng(seed).standard_normal(shape)).astype(np.float32) for seed in (3, 4)]
    with device() as machine:
        there = [cupy.array(array) for array in host]
        the_rule = rule(Flags(), np.float32)
        live = {(0, FLOAT32): cupy.array(the_rule.scalars)}
        old = the_rule._replace(scalars=np.full_like(the_rule.scalars, 5), live=live)
        run = machine.execute
        machine.execute = lambda kernel, *rest, **options: (
            None if kernel.name == "set_scalars" else run(kernel, *rest, **options)
        )
        indices = None if ids is None else cupy.array(ids)
        got = Update(*there, None, None, old, cupy.array(values), indices)
        update_on_gpu([got])
        want = Update(*host, None, None, the_rule, values, ids)
        update_on_cpu([want])
        assert_updated(got, want)


def replayed_variables() -> None:
    replayed(None)


def replayed_rows() -> None:
    replayed(np.array([1] + [2] * 40 + [5, 5], np.int32))


def packed_tiles() -> None:
    """One tile, aligned: with packed accesses it takes no more instructions than this."""
    dense(Flags(), [(1024, "")], steps=150)  # unpacked it takes 200


def float16_and_bfloat16() -> None:
    dense(Flags(), [(2048 + 300, "")], (FLOAT16, FLOAT16, BFLOAT16))


def bfloat16_and_float16() -> None:
    dense(Flags(), [(2048 + 300, "")], (BFLOAT16, FLOAT32, FLOAT16))


def bfloat16_and_float64() -> None:
    dense(Flags(), [(2048 + 300, "")], (BFLOAT16, FLOAT64, FLOAT64))


def float64() -> None:
    dense(Flags(has_momentum=True), [(512 + 100, "")], (FLOAT64,) * 3)


def float64_with_slots_of(dtype: Any) -> None:
    """Slots on which rounding twice would show: just past the middle between two of them, by less than float32 has."""
    n = 2048 + 300
    with device():
        the_rule = rule(Flags(), np.float64)
        the_rule.scalars[SCALARS.index("one_minus_rho")] = 1.0  # rms becomes the gradient's square
        start = np.random.default_rng(3).integers(0x3C00, 0x4400, n).astype(np.uint16)
        if dtype == BFLOAT16:
            start = np.random.default_rng(3).integers(0x3F00, 0x4080, n).astype(np.uint16)
        low, high = start.view(dtype).astype(np.float64), (start + np.uint16(1)).view(dtype).astype(np.float64)
        middle = (low + high) / 2
        odd = np.arange(n) % 2 * np.spacing(middle.astype(np.float32))  # the middle's lowest float32 bit is 0
        middle = (middle + odd) * (1 + np.random.default_rng(4).integers(-1, 2, n) * 2.0**-40)
        grad = np.sqrt(middle)
        grad[:6] = [np.inf, np.nan, 0, 1e-30, 300.0, -300.0]
        var = hard(n, 5, np.float64)
        arrays = {"var": var, "rms": np.zeros(n, dtype), "grad": grad}
        there = Update(**{k: shifted(v, 0) for k, v in arrays.items()}, mom=None, mg=None, rule=the_rule)
        host = Update(**arrays, mom=None, mg=None, rule=the_rule)
        update_on_gpu([there])
        update_on_cpu([host])
        assert_updated(there, host)


def float64_and_float16() -> None:
    float64_with_slots_of(FLOAT16)


def float64_and_bfloat16() -> None:
    float64_with_slots_of(BFLOAT16)
