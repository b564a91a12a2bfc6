"""The update rule: every option, shape, type and layout against the oracle, and equal bits everywhere.

Each step is compared from the state that the library itself left, so errors do not add up. The oracle of the
compute type must be met to the bit, and independently the float64 oracle to within the rounding of some 60
operations relative to the largest number of the array. (Within the few steps made here `rms - mg*mg` keeps at
least a tenth of `rms`, so centering adds no cancellation to that.)
"""

from functools import cache

import numpy as np
import pytest

import gpurms
from tests import cases, engines, oracle
from tests.cases import LEARNING_RATES, RULES, SHAPES, TABLES, gradients_for, normal
from tests.support import DTYPES, host

ROUNDINGS = 64
SIXTEEN_BITS = DTYPES[:2]
each_rule = pytest.mark.parametrize("rule", RULES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
each_other_engine = pytest.mark.parametrize("engine", ["numba", *engines.DEVICE], indirect=True)


def compute_type(dtype):
    return np.float64 if dtype == np.float64 else np.float32


def as_bits(x):
    return np.atleast_1d(np.array(x)).view(f"u{x.dtype.itemsize}")


def assert_bits(got, want, where):
    """Equal shape, dtype and bits, where any NaN equals any other."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), where
    got, want = np.atleast_1d(got, want)
    both_nan = np.isnan(got) & np.isnan(want)
    different = (as_bits(got) != as_bits(want)) & ~both_nan
    if different.any():
        at = tuple(int(i) for i in np.argwhere(different)[0])
        message = f"{different.sum()} of {different.size} differ, at {at} got {got[at]!r}, want {want[at]!r}"
        raise AssertionError(f"{where}: {message}")


def assert_near(got, want, scale, number, where):
    """Equal up to the roundings of the compute type and one of the storage type."""
    allowed = np.full(want.shape, ROUNDINGS * np.finfo(number).eps / 2 * scale)
    if got.dtype.name in oracle.FORMATS:
        bits, lowest, _ = oracle.FORMATS[got.dtype.name]
        allowed += 2.0**-bits * abs(want) + 2.0 ** (lowest - 1)
    wrong = ~(abs(got.astype(np.float64) - want) <= allowed)
    assert not wrong.any(), f"{where}: got {got[wrong][0]!r}, want {want[wrong][0]!r} +- {allowed[wrong][0]}"


class Checked:
    """An optimizer and its variables, of one dtype, by name; every step is compared with the oracle."""

    def __init__(self, engine, options, arrays, slot_dtype=None):
        self.engine = engine
        self.options = options
        self.variables = [engine.variable(x, str(name)) for name, x in arrays.items()]
        self.slot_dtype = slot_dtype
        self.opt = gpurms.RMSprop(**options, slot_dtype=slot_dtype)

    def state(self, variable):
        """Copies of the variable and its slots; before the first step, of what the slots are to start with."""
        dtype = np.dtype(self.slot_dtype or compute_type(variable.dtype))
        starts = {"rms": self.options.get("initial_accumulator_value", 0.0)}
        starts |= {"momentum": 0.0} if self.options.get("momentum") else {}
        starts |= {"mg": 0.0} if self.options.get("centered") else {}
        if int(self.opt.iterations.numpy()) == 0:
            slots = {slot: np.full(variable.shape, oracle.stored(x, dtype)) for slot, x in starts.items()}
        else:
            slots = {slot: host(self.opt.get_slot(variable, slot)) for slot in starts}
            assert {x.dtype for x in slots.values()} == {dtype}
        return {"var": host(variable), **slots}

    def step(self, learning_rate, grads):
        self.opt.learning_rate = learning_rate
        old = [self.state(variable) for variable in self.variables]
        kept = [np.array(getattr(grad, "values", grad)) for grad in grads]
        given = [self.engine.put(grad) for grad in grads]
        self.opt.apply_gradients(zip(given, self.variables))

        options = {**self.options, "learning_rate": learning_rate}
        factors = oracle.clip_factors(oracle.scalars(float, **options), kept)
        for variable, grad, factor, before in zip(self.variables, grads, factors, old):
            after = self.state(variable)
            compare = compare_rows if isinstance(grad, gpurms.IndexedSlices) else compare_dense
            for number in (float, compute_type(variable.dtype)):
                s = oracle.scalars(number, **options)
                rounded = None if factor is None else number(factor)
                compare(s, grad, rounded, before, after, variable.name)
        for now, before in zip(given, kept):
            assert_bits(host(getattr(now, "values", now)), before, "a gradient that was passed in")


def compare_dense(s, grad, factor, before, after, where):
    slots, compute = without_var(before), compute_type(before["var"].dtype)
    at = cases.sample(before["var"].size)
    want = oracle.dense(s, before["var"], grad, slots, factor, at)
    for name, x in want.items():
        old, got = before[name].reshape(-1)[at], after[name].reshape(-1)[at]
        compare(s, compute, got, x, old, f"{where}, {name}")


def compare_rows(s, grad, factor, before, after, where):
    slots, compute = without_var(before), compute_type(before["var"].dtype)
    n_rows, row_size = len(before["var"]), int(np.prod(before["var"].shape[1:]))
    columns = cases.sample(row_size)
    rows, want = oracle.sparse(s, before["var"], grad.values, grad.indices, slots, factor, columns)
    others = np.setdiff1d(np.arange(n_rows), rows)
    for name, x in want.items():
        old, got = before[name].reshape(n_rows, row_size), after[name].reshape(n_rows, row_size)
        compare(s, compute, got[rows][:, columns], x, old[rows][:, columns], f"{where}, {name}")
        assert_bits(got[others], old[others], f"{where}, {name}, rows without a gradient")


def without_var(state):
    return {slot: x for slot, x in state.items() if slot != "var"}


def compare(s, compute, got, want, old, where):
    if s.number is float:
        scale = max(abs(want).max(initial=0), abs(old.astype(np.float64)).max(initial=0))
        assert_near(got, want, scale, compute, where)
    else:
        assert_bits(got, oracle.stored(want, got.dtype), where)


def large(engine):
    return cases.LARGE_EMULATED if engine.is_emulated else cases.LARGE


def n_steps(engine):
    """Two have both types of ids, and slots to start from."""
    return 2 if engine.is_emulated else len(LEARNING_RATES)


def ids_and_values(rng, rule, name, dtype, step):
    """A sparse gradient for a table, of positive numbers: sums that cancel would void the float64 bound."""
    shape, ids = TABLES[name]
    values = abs(gradients_for(RULES[rule])(rng, (len(ids), *shape[1:]), dtype))
    return gpurms.IndexedSlices(values, rng.permutation(ids).astype(("i4", "i8")[step % 2]))


@each_rule
@each_dtype
def test_dense(rule, dtype, engine):
    rng = np.random.default_rng(1)
    checked = Checked(engine, RULES[rule], {shape: normal(rng, shape, dtype) for shape in SHAPES})
    for learning_rate in LEARNING_RATES:
        checked.step(learning_rate, [gradients_for(RULES[rule])(rng, x, dtype) for x in SHAPES])


@each_rule
@each_dtype
def test_sparse(rule, dtype, engine):
    rng = np.random.default_rng(2)
    tables = {name: abs(normal(rng, shape, dtype)) for name, (shape, _) in TABLES.items()}
    checked = Checked(engine, RULES[rule], tables)
    for step, learning_rate in enumerate(LEARNING_RATES[: n_steps(engine)]):
        checked.step(learning_rate, [ids_and_values(rng, rule, name, dtype, step) for name in TABLES])


@each_dtype
@pytest.mark.parametrize("rule", ["default", "everything"])
def test_hottest_row(rule, dtype, engine):
    rng, (shape, ids) = np.random.default_rng(3), cases.HOTTEST
    values = abs(gradients_for(RULES[rule])(rng, (len(ids), *shape[1:]), dtype)) / dtype.type(64)
    checked = Checked(engine, RULES[rule], {"table": abs(normal(rng, shape, dtype))})
    checked.step(0.1, [gpurms.IndexedSlices(values, rng.permutation(ids))])


@each_dtype
@pytest.mark.parametrize("slot_dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_slot_dtype(dtype, slot_dtype, engine):
    rng, options = np.random.default_rng(4), RULES["everything"]
    tables = {name: abs(normal(rng, (50, 3), dtype)) for name in ("dense", "sparse")}
    checked = Checked(engine, options, tables, slot_dtype)
    for learning_rate in LEARNING_RATES:
        values, ids = abs(gradients_for(options)(rng, (60, 3), dtype)), rng.integers(0, 40, 60)
        checked.step(learning_rate, [values[:50], gpurms.IndexedSlices(values, ids)])


@pytest.mark.parametrize("wide", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=lambda dtype: dtype.name)
def test_wider_gradients(dtype, wide, engine):
    rng = np.random.default_rng(5)
    tables = {name: abs(normal(rng, (50, 3), dtype)) for name in ("dense", "sparse")}
    checked = Checked(engine, RULES["centered-momentum"], tables)
    for learning_rate in LEARNING_RATES:
        values, ids = abs(normal(rng, (60, 3), wide)), rng.integers(0, 40, 60)
        checked.step(learning_rate, [values[:50], gpurms.IndexedSlices(values, ids)])


def test_the_variance_is_never_negative(engine):
    # Without the clamp rms - mg*mg becomes -4.8e-7 at step 253, and the root NaN.
    checked = Checked(engine, {"centered": True, "learning_rate": 0.1}, {"one": np.ones(1, np.float32)})
    three, one = (engine.put(np.full(1, g, np.float32)) for g in (3, 1))
    for step in range(300):
        checked.opt.apply_gradients([(three if step < 100 else one, checked.variables[0])])
        rms, mg = (host(checked.opt.get_slot(checked.variables[0], slot)) for slot in ("rms", "mg"))
        assert np.isfinite(host(checked.variables[0])).all(), step
        if (rms - mg * mg < 0).any():
            checked.step(0.1, [np.ones(1, np.float32)])
            return
    raise AssertionError("the state never had a negative variance: the test shows nothing")


def run_layouts(rule, dtype, steps, size, engine):
    """State after steps of the same numbers in every layout, by name and layout, and of a large array."""
    rng, make = np.random.default_rng(6), gradients_for(RULES[rule])
    start, large = normal(rng, (30, 5, 4), dtype), engine.variable(normal(rng, size, dtype))
    tables = {(kind, layout): engine.variable(f(start)) for kind in ("dense", "rows") for layout, f in LAYOUTS}
    opt = gpurms.RMSprop(**RULES[rule])
    for step in range(steps):
        grad, values, ids = make(rng, (30, 5, 4), dtype), make(rng, (90, 5, 4), dtype), rng.integers(0, 25, 90)
        pairs = [(make(rng, size, dtype), large)]
        for (kind, layout), variable in tables.items():
            f = dict(LAYOUTS)["C" if step == 1 else layout]
            sparse = gpurms.IndexedSlices(f(values), cases.strided(ids))
            pairs.append((f(grad) if kind == "dense" else sparse, variable))
        opt.apply_gradients([(engine.put(grad), variable) for grad, variable in pairs])
    slots = opt.get_slot_names()
    states = {name: [host(x), *(host(opt.get_slot(x, slot)) for slot in slots)] for name, x in tables.items()}
    return {**states, ("large", "C"): [host(large), *(host(opt.get_slot(large, slot)) for slot in slots)]}


LAYOUTS = tuple(cases.LAYOUTS.items())


@cache
def by_numpy(run, *case):
    """What the other engines must find, to the bit."""
    with engines.running("numpy") as engine:
        return run(*case, engine)


@each_rule
@each_dtype
@each_other_engine
def test_layouts_and_engines_have_the_same_bits(rule, dtype, engine):
    case = rule, dtype, n_steps(engine), large(engine)
    want = by_numpy(run_layouts, *case)
    for (kind, layout), arrays in run_layouts(*case, engine).items():
        for got, other, plain in zip(arrays, want[kind, layout], want[kind, "C"], strict=True):
            assert_bits(got, other, f"{kind} {layout}, {engine.name} and numpy")
            assert_bits(got, plain, f"{kind} {layout} and C order")


def test_large(engine):
    rng = np.random.default_rng(7)
    for dtype in DTYPES:
        checked = Checked(engine, RULES["everything"], {dtype.name: normal(rng, large(engine), dtype)})
        checked.step(0.1, [cases.eighths(rng, large(engine), dtype)])


ODD = [np.nan, np.inf, -np.inf, 0.0, -0.0, 6e4, -6e4, 6e-8, 1.0]


def run_odd(rule, dtype, engine):
    """States of variables that start alike: plain gradients, some odd ones, and the odd ones as rows."""
    rng = np.random.default_rng(8)
    start, grads = normal(rng, (40,), dtype), normal(rng, (2, 40), dtype)
    plain, dense, rows = (engine.variable(start.copy()) for _ in range(3))
    opt = gpurms.RMSprop(**RULES[rule])
    for grad in grads:
        odd = grad.copy()
        odd[: len(ODD)] = ODD
        slices = gpurms.IndexedSlices(odd, np.arange(40))
        given = [engine.put(each) for each in (grad, odd, slices)]
        opt.apply_gradients(zip(given, (plain, dense, rows)))
    slots = opt.get_slot_names()
    return [[host(x), *(host(opt.get_slot(x, slot)) for slot in slots)] for x in (plain, dense, rows)]


@each_rule
@each_dtype
@each_other_engine
def test_odd_numbers_touch_only_their_own_elements(rule, dtype, engine):
    found = run_odd(rule, dtype, engine)
    for arrays, others in zip(found, by_numpy(run_odd, rule, dtype)):
        for got, other in zip(arrays, others):
            assert_bits(got, other, f"{engine.name} and numpy")
    for plain, dense, rows in zip(*found):
        assert_bits(rows, dense, "sparse and dense")
        if "global_clipnorm" in RULES[rule]:
            assert np.isnan([plain, dense]).all(), "a norm of NaN is the call's"
        elif "clipnorm" in RULES[rule]:
            assert np.isfinite(plain).all()
            assert np.isnan(dense).all(), "a norm of NaN is the whole gradient's"
        else:
            assert_bits(dense[len(ODD) :], plain[len(ODD) :], "elements with plain gradients")


def mixed(engine):
    """Variables of all types and kinds with a gradient each."""
    rng = np.random.default_rng(9)
    pairs = []
    for dtype in DTYPES:
        for shape in SHAPES:
            pairs.append((normal(rng, shape, dtype), normal(rng, shape, dtype)))
        for name in ("1-d", "3-d", "hot", "no ids"):
            shape = TABLES[name][0]
            pairs.append((ids_and_values(rng, "default", name, dtype, 1), normal(rng, shape, dtype)))
    pairs.append((np.float32(3.0), np.array(2.0, np.float32)))
    return [(engine.put(grad), engine.variable(x)) for grad, x in pairs]


@pytest.mark.parametrize("rule", ["momentum", "everything"])
def test_a_call_with_many_variables_is_as_many_calls(rule, engine):
    together, alone = mixed(engine), mixed(engine)
    opt = gpurms.RMSprop(**RULES[rule])
    singles = [gpurms.RMSprop(**RULES[rule]) for _ in alone]
    for _ in range(3):
        opt.apply_gradients(together)
        for single, pair in zip(singles, alone):
            single.apply_gradients([pair])
    for (_, got), (_, want), single in zip(together, alone, singles):
        assert_bits(host(got), host(want), f"{got.dtype} {got.shape}")
        for slot in opt.get_slot_names():
            where = f"{got.dtype} {got.shape} {slot}"
            assert_bits(host(opt.get_slot(got, slot)), host(single.get_slot(want, slot)), where)


@each_dtype
def test_a_variable_twice_in_a_call_is_updated_twice(dtype, engine):
    rng = np.random.default_rng(10)
    start = normal(rng, (9, 4, 16), dtype)
    grads = [normal(rng, start.shape, dtype), ids_and_values(rng, "default", "3-d", dtype, 0)]
    grads = [engine.put(grads[i]) for i in (0, 1, 1, 0, 0)]
    once, twice, other = (engine.variable(start.copy()) for _ in range(3))
    one, many = gpurms.RMSprop(**RULES["everything"]), gpurms.RMSprop(**RULES["everything"])
    assert many.apply_gradients([(grads[0], other), *((grad, twice) for grad in grads)]) == 1
    for grad in grads:
        one.apply_gradients([(grad, once)])
    assert_bits(host(twice), host(once), "variable")
    for slot in one.get_slot_names():
        assert_bits(host(many.get_slot(twice, slot)), host(one.get_slot(once, slot)), slot)
