"""CuPy arrays: what one call launches, on each device, on CuPy's current stream there.

Contiguous dense variables go through ``multi.cu``, one launch for all that share types and rule; others through an
``ElementwiseKernel`` each, with the same rule; sparse gradients through ``rows.cu``. ``plan`` compiles and allocates,
so that what can fail fails before anything changes; the function it returns only launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import cupy
import numpy as np

from gpurms.clipping import Clip
from gpurms.kernels import cuda_norm, cuda_rows
from gpurms.kernels.launch import (
    POINTER,
    TYPES,
    Planned,
    defines,
    element_types,
    elementwise,
    flags,
    is_capturing,
    kernel,
    parameter_bytes,
    scalars_type,
    table_type,
    types,
)
from gpurms.kernels.rule import SCALARS, Flags, Rule, Step, Update

THREADS = 256
RULE = ("storage.cuh", "rmsprop.cuh")
HEADER = 96
"""Bytes of parameters kept free for those in front of a table, and for its alignment."""


class State:
    """What stays the same from step to step: where variable and slots are, and their types."""

    __slots__ = ("_tables", "addresses", "device", "n", "slots", "table", "types", "workspace")

    def __init__(self, update: Update) -> None:
        var = update.var
        self.slots = [slot for slot in (update.rms, update.mom, update.mg) if slot is not None]
        self.device: int = var.data.device_id
        self.n: int = var.size
        arrays = [var, *self.slots]
        flat = all(array.flags.c_contiguous for array in arrays)
        self.addresses = [int(array.data.ptr) for array in arrays] if flat else []
        self.types = element_types(update)
        self.table: _Table | None = None  # of the group of updates that this one is the first of
        self.workspace = cuda_rows.Workspace()
        self._tables: cuda_rows.Tables | None = None

    def tables(self, update: Update) -> cuda_rows.Tables:
        """The arrays as tables of rows."""
        if self._tables is None:
            self._tables = cuda_rows.Tables(update)
        return self._tables


def prepared(update: Update) -> State:
    """The state of an update, made at its first step."""
    state: State | None = update.prepared
    if state is None:
        state = update.prepared = State(update)
    return state


class Plan:
    """All that the updates of a call need, compiled and allocated; called, it launches.

    ``sends``: it brings live scalars to the devices first, except while a graph is captured, and refuses to be captured
    where there are none. Else all that is the caller's.
    """

    def __init__(self, updates: Sequence[Update], sends: bool = True) -> None:
        by_device: dict[int, list[Update]] = {}
        for update in updates:
            by_device.setdefault(prepared(update).device, []).append(update)
        self.updates = updates
        self.planned = [(device, _plan_on_device(device, some, sends)) for device, some in by_device.items()]

    def __call__(self) -> None:
        """Launch, on each device's current stream."""
        for device, planned in self.planned:
            with cupy.cuda.Device(device):
                for each in planned:
                    each()


class Repeat:
    """The launches of a call whose variables were all dense, contiguous and on one device, for other gradients."""

    def __init__(self, device: int, updates: Sequence[Update], groups: Sequence[_Dense], clip: Clip | None) -> None:
        self._device = device
        with cupy.cuda.Device(device):
            self._factors = None if clip is None else cuda_norm.Repeated(device, len(updates), clip)
        position = {id(update): i for i, update in enumerate(updates)}
        self._groups = [(group, np.array([position[id(update)] for update in group.table.updates])) for group in groups]
        self._addresses: list[Any] = [None] * len(groups)
        if self._factors is not None:
            with cupy.cuda.Device(device):
                self._addresses = [
                    self._factors.add(
                        group.table.grad_type, group.compute, [prepared(each).n for each in group.table.updates], places
                    )
                    for group, places in self._groups
                ]

    def __call__(self, pointers: np.ndarray[Any, Any], now: Step) -> None:
        """Apply gradients of the types and layouts of before, with the flags of before."""
        with cupy.cuda.Device(self._device):
            refuse_capture()
            if self._factors is not None:
                self._factors(pointers)
            for (group, positions), addresses in zip(self._groups, self._addresses):
                group.repeat(pointers[positions], addresses, now)


def repeat(plan: Plan, clip: Clip | None) -> Repeat | None:
    """The plan for use with other gradients, if it launches nothing but ``multi``."""
    if len(plan.planned) != 1:
        return None
    device, planned = plan.planned[0]
    groups = [each for each in planned if isinstance(each, _Dense)]
    n_taken = sum(len(each.table.updates) for each in groups)
    return Repeat(device, plan.updates, groups, clip) if len(groups) == len(planned) and n_taken else None


def by_address(updates: Sequence[Update]) -> Callable[..., None] | None:
    """``f(pointers, now, factor=None)`` applies dense gradients of the types and layouts of these, by their addresses.

    ``pointers``: of each update's gradient, int64. ``factor``: by (device, compute type) the array of one element by
    which all are multiplied, where the flags of ``now`` say so. ``now.live`` holds the scalars if it is given. One
    launch per device, types and rule, which may be captured. None for updates that are not contiguous.
    """
    places: dict[Any, list[int]] = {}
    for i, update in enumerate(updates):
        state = prepared(update)
        if not state.addresses or not update.grad.flags.c_contiguous:
            return None
        if state.n:
            key = (state.device, update.rule.flags, update.rule.compute, *state.types.values(), update.grad.dtype)
            places.setdefault(key, []).append(i)
    groups = []
    for (device, *_), at in places.items():
        with cupy.cuda.Device(device):
            table = _Table([updates[i] for i in at])
            table.kernel.compile()
            groups.append((_Dense(table, updates[at[0]].rule, []), np.array(at)))

    def apply(pointers: np.ndarray[Any, Any], now: Step, factor: Mapping[Any, Any] | None = None) -> None:
        for group, at in groups:
            given = None if factor is None else int(factor[group.device, group.compute].data.ptr)
            with cupy.cuda.Device(group.device):
                group.repeat(pointers[at], given, now)

    return apply


def _plan_on_device(device: int, updates: Sequence[Update], sends: bool) -> list[Planned]:
    with cupy.cuda.Device(device):
        planned = list(_send_scalars(device, updates)) if sends else []
        strided: list[Planned] = []
        groups: dict[Any, list[Update]] = {}
        for update in updates:
            state: State = update.prepared
            if state.n == 0:
                continue
            if update.indices is not None:
                if update.indices.size:
                    rule = update.rule
                    live, skip = live_scalars(rule.live, device, rule.compute), skip_flag(rule.skip, device)
                    planned.append(cuda_rows.plan(update, state.tables(update), live, skip, state.workspace))
            elif state.addresses and update.grad.flags.c_contiguous:
                groups.setdefault((id(update.rule), *state.types.values(), update.grad.dtype), []).append(update)
            else:
                strided.append(_plan_strided(update))
        return planned + strided + [_plan_dense(group) for group in groups.values()]


def _send_scalars(device: int, updates: Sequence[Update]) -> Iterator[Planned]:
    """Launches that bring the scalars of a capturable step to the device; none while a graph is captured."""
    capturing = is_capturing()
    for rule in {update.rule.compute: update.rule for update in updates}.values():
        if rule.live is None:
            refuse_capture()
        elif not capturing:
            place = (device, rule.compute)
            if place not in rule.live:
                live = cupy.empty(len(SCALARS), rule.compute)
                _sending(rule.scalars, live)()  # at once: should this step fail, a capture may still find it
                rule.live[place] = live
            yield _sending(rule.scalars, rule.live[place])
        elif (device, rule.compute) not in rule.live:
            raise RuntimeError("take one step with these variables before capturing one")


def refuse_capture() -> None:
    """RuntimeError while a graph is captured: it would keep the numbers of this step."""
    if is_capturing():
        raise RuntimeError("a step can be captured in a graph only if the optimizer has capturable=True")


def _sending(scalars: np.ndarray[Any, Any], live: Any) -> Planned:
    """The launch that writes ``scalars`` to ``live``, through its parameters: no copy, nothing to wait for."""
    scalars_struct = scalars_type(scalars.dtype)
    macros = defines(types(scalars.dtype), flags(Flags()))
    write = kernel((*RULE, "scalars.cu"), "set_scalars", macros, (scalars_struct, POINTER))
    write.compile()
    return lambda: write(1, 1, scalars.view(scalars_struct), live)


def send_scalars(live: Mapping[Any, Any], scalars_of: Callable[[np.dtype[Any]], np.ndarray[Any, Any]]) -> None:
    """Write the scalars of each compute type to every place where steps read them."""
    for (device, compute), array in live.items():
        with cupy.cuda.Device(device):
            _sending(scalars_of(compute), array)()


def live_scalars(live: Any, device: int, compute: np.dtype[Any]) -> Any:
    """Where kernels find the scalars on the device, or None: among their parameters."""
    return None if live is None else live[device, compute]


def skip_flag(skip: Any, device: int) -> Any:
    """Where kernels find on the device whether the step is left out, or None: it is not."""
    return None if skip is None else skip[device]


# -------------------------------------------------------------------------------------------------- dense, contiguous


class _Table:
    """The table of a group of updates, for as many launches as its length needs.

    Only gradients and factors change from step to step. It is a kernel parameter, which a launch copies, so it may be
    written again at once.
    """

    def __init__(self, updates: list[Update]) -> None:
        first, state = updates[0], prepared(updates[0])
        rule, grad_type = first.rule, first.grad.dtype
        self.updates = updates
        self.flags, self.grad_type = rule.flags, grad_type
        n_slots = len(state.slots)
        n_columns = 2 + n_slots + rule.flags.has_factor + 2  # var, grad, slots, factor, n, first_tile
        self.factor_column = 2 + n_slots
        widest = parameter_bytes(state.device)
        narrow, wide = ((n_bytes - HEADER) // (8 * n_columns) for n_bytes in (4096, widest))
        capacity = narrow if len(updates) <= narrow else wide
        elements = types(rule.compute, grad_t=grad_type, **state.types)
        tile = THREADS * elements["VECTOR"]
        parameters = (scalars_type(rule.compute), POINTER, POINTER, np.int32, table_type(8 * n_columns * capacity))
        macros = defines(flags(rule.flags), elements, {"THREADS": THREADS, "CAPACITY": capacity})
        self.kernel = kernel((*RULE, "multi.cu"), "multi", macros, parameters)

        n_launches = -(-len(updates) // capacity)
        self.words = np.zeros((n_launches * capacity, n_columns), np.int64)
        states = [prepared(update) for update in updates]
        rows = self.words[: len(updates)]
        rows[:, [0, *range(2, 2 + n_slots)]] = [each.addresses for each in states]
        rows[:, -2] = [each.n for each in states]
        n_tiles = -(-rows[:, -2] // tile)
        self.launches = []  # blocks, variables, struct
        for left in range(0, len(updates), capacity):
            some = n_tiles[left : left + capacity]
            ends = np.cumsum(some)
            rows[left : left + capacity, -1] = ends - some
            struct = self.words[left : left + capacity].reshape(-1).view(parameters[-1])
            self.launches.append((int(ends[-1]), some.size, struct))

    def fill(self) -> None:
        """Gradients and factors of this step."""
        n = len(self.updates)
        self.words[:n, 1] = [update.grad.data.ptr for update in self.updates]
        if self.flags.has_factor:
            self.words[:n, self.factor_column] = [update.factor.address for update in self.updates]

    def fits(self, updates: list[Update]) -> bool:
        """Whether it is the table of these updates, in this order."""
        rule = updates[0].rule
        return self.flags == rule.flags and self.grad_type == updates[0].grad.dtype and self.updates == updates


def _plan_dense(updates: list[Update]) -> _Dense:
    state = prepared(updates[0])
    table = state.table
    if table is None or not table.fits(updates):
        table = state.table = _Table(updates)
    table.fill()
    table.kernel.compile()
    return _Dense(table, updates[0].rule, [(update.grad, update.factor) for update in updates])


class _Dense:
    """The launches of one table. ``kept`` is what they read: until they are launched, or for as long as a graph is."""

    def __init__(self, table: _Table, rule: Rule, kept: list[Any]) -> None:
        self.table, self.kept = table, kept
        self.compute = rule.compute
        self.scalars = rule.scalars.view(scalars_type(rule.compute))
        self.device = prepared(table.updates[0]).device
        self.live, self.skip = live_scalars(rule.live, self.device, rule.compute), skip_flag(rule.skip, self.device)

    def __call__(self) -> None:
        for n_blocks, count, struct in self.table.launches:
            self.table.kernel(n_blocks, THREADS, self.scalars, self.live, self.skip, count, struct)
        if self.live is None:
            self.kept, self.skip = [], None

    def repeat(self, pointers: np.ndarray[Any, Any], factors: np.ndarray[Any, Any] | int | None, now: Step) -> None:
        """Launch with other gradients, factors (their addresses) and numbers."""
        self.table.words[: pointers.size, 1] = pointers
        if factors is not None:
            self.table.words[: pointers.size, self.table.factor_column] = factors
        self.scalars = now.scalars(self.compute).view(scalars_type(self.compute))
        self.live, self.skip = live_scalars(now.live, self.device, self.compute), skip_flag(now.skip, self.device)
        self()


# ------------------------------------------------------------------------------------------------ dense, other layouts


def _plan_strided(update: Update) -> Planned:
    """CuPy's kernel works out where elements are, in any layout; the operation is the same rule."""
    rule = update.rule
    names = ["var", "rms", "mom", "mg"]
    written = {name: array for name in names if (array := getattr(update, name)) is not None}
    compute = TYPES[rule.compute.name]
    readable = {"grad": update.grad, **written}
    macros = {f"{name}_t": TYPES[array.dtype.name] for name, array in readable.items()}
    live = live_scalars(rule.live, prepared(update).device, rule.compute)
    skip = skip_flag(rule.skip, prepared(update).device)
    raw = {"factor": update.factor.view} if rule.flags.has_factor else {}
    raw |= {} if live is None else {"live": live}
    raw |= {} if skip is None else {"skip": skip}
    scalars = {} if live is not None else dict(zip(SCALARS, rule.scalars))

    inputs = [f"{_plain_type(update.grad)} grad", *(f"raw {array.dtype} {name}" for name, array in raw.items())]
    inputs += [f"{rule.compute.name} {name}" for name in scalars]
    outputs = [f"{_plain_type(array)} {name}" for name, array in written.items()]
    numbers = [f"live[{i}]" for i in range(len(SCALARS))] if live is not None else SCALARS
    lines = [] if skip is None else ["if (skip[0] != 0) return;"]
    lines += ["using namespace gpurms;", f"Scalars s = {{{', '.join(numbers)}}};"]
    lines += [
        f"{compute} {name}_ = {f'widen(reinterpret_cast<const {name}_t&>({name}))' if name in readable else 0};"
        for name in ("grad", *names)
    ]
    factor = "factor[0]" if "factor" in raw else "1"
    lines.append(f"update(load(grad_, {factor}, s), var_, rms_, mom_, mg_, s);")
    lines += [f"narrow({name}_, reinterpret_cast<{name}_t&>({name}));" for name in written]
    run = elementwise(
        ", ".join(inputs), ", ".join(outputs), "\n".join(lines),
        defines(flags(rule.flags), types(rule.compute), macros), RULE,
    )  # fmt: skip
    _try(run, [update.grad], [*raw.values(), *scalars.values()], list(written.values()))
    arguments = [_plain(update.grad), *raw.values(), *scalars.values(), *(_plain(array) for array in written.values())]
    return partial(_launch_strided, run, arguments, update.factor)


def _launch_strided(run: Any, arguments: list[Any], kept: Any) -> None:
    """``kept`` is what the factor is made from: a graph goes on using it."""
    run(*arguments)


@cache
def _tried() -> set[Any]:
    return set()


def _try(run: Any, read: list[Any], others: list[Any], written: list[Any]) -> None:
    """Run a kernel once on small arrays: CuPy compiles it only then, and a step must not fail halfway for that."""
    if run not in _tried() and not is_capturing():
        scratch = [_plain(cupy.ones((4, 4), np.float32).astype(array.dtype)[::2, ::2]) for array in (*read, *written)]
        run(*scratch[: len(read)], *others, *scratch[len(read) :])
        _tried().add(run)


def _plain_type(array: Any) -> str:
    return "uint16" if array.dtype.itemsize == 2 else str(array.dtype.name)


def _plain(array: Any) -> Any:
    """16-bit floats as their bits, which every CuPy passes."""
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array
