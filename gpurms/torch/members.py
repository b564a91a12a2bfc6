"""The parameters of one step and their slots, and how their gradients get to the kernels.

Parameters that fill their memory, with gradients in the same order of dimensions, go by their addresses: the usual
case, in which nothing is looked up or made from step to step. All others are prepared anew each time: tables with
sparse gradients, views with gaps, parameters that share memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter, is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpurms import backend
from gpurms.kernels.rule import Flags, Step, Update, release
from gpurms.torch import tensors
from gpurms.torch.memory import Array, Looks, Memory, addresses, reach
from gpurms.torch.scaling import Factors
from gpurms.torch.tensors import TYPES, array, array_type

Launch = Callable[[], None]
KEPT = 4
"""Combinations that are remembered: of layouts of gradients; of parameters that have gradients."""

_layout = attrgetter("layout")


class Parts(NamedTuple):
    """Parameters, what this rank holds of them and of their slots (by name, then by parameter), and counts of steps."""

    parameters: list[Tensor]
    own: Sequence[Tensor]
    slots: list[Sequence[Tensor]]
    steps: list[Tensor]

    def flat_slots(self) -> list[Tensor]:
        """All slots in one list."""
        return [slot for of_name in self.slots for slot in of_name]


class Members:
    """The parameters of a step, for as long as they and their slots stay where they are."""

    def __init__(self, parts: Parts, flags: Flags) -> None:
        parameters, own, slots, steps = parts
        for var in own:
            if tensors.overlaps_itself(var):
                raise RuntimeError(f"a parameter of shape {tuple(var.shape)}: several of its elements share memory")
            if var.numel() and not var.data_ptr():
                raise RuntimeError(f"a parameter: a {type(var).__name__} has no memory of its own")
        self.parameters, self.steps, self.flags = parameters, steps, flags
        self.steps_by_device: dict[torch.device, list[Tensor]] = {}
        for each in steps:
            self.steps_by_device.setdefault(each.device, []).append(each)
        self._own, self._looks = own, Looks(own)
        self._slots = parts.flat_slots()
        self._addresses = addresses([*own, *self._slots])
        self._arrays = list(zip(own, *slots))
        self._memory = Memory(self._arrays)
        self._is_flat = [
            i not in self._memory.overlapping
            and tensors.is_dense(var)
            and all(tensors.steps(slot) == tensors.steps(var) for slot in rest)
            for i, (var, *rest) in enumerate(self._arrays)
        ]
        self._updates: dict[tuple[int, Any], Update] = {}
        self._direct: dict[tuple[torch.layout, ...], _Direct] = {}  # by the layouts of all gradients

    def fit(self, parts: Parts, flags: Flags) -> bool:
        """Whether these are still they, where they were. A slot that is the same tensor there looks the same."""
        if len(parts.parameters) != len(self.parameters) or not all(map(is_, parts.parameters, self.parameters)):
            return False
        slots = parts.flat_slots()
        return (
            flags == self.flags
            and all(map(is_, parts.steps, self.steps))
            and all(map(is_, slots, self._slots))
            and bool((addresses([*parts.own, *slots]) == self._addresses).all())
            and self._looks.fit(parts.own)
        )

    def plan(self, grads: Sequence[Tensor], now: Step, factors: Factors) -> list[Launch]:
        """Check the gradients and prepare all updates; what is returned applies them, in order."""
        layouts = tuple(map(_layout, grads))
        direct = self._direct.get(layouts)
        if direct is None or not direct.fit(grads):
            if len(self._direct) > KEPT:
                self._direct.clear()
            direct = self._direct[layouts] = self._make_direct(grads, now)
        picked, pointers = self._addressed(direct, direct.picked(grads))
        launches = direct.launches(picked, pointers, now, factors)
        rest: list[tuple[backend.Backend, Update, bool]] = []
        try:
            for i in direct.others:
                update = self._filled(i, self._normal(i, grads[i]), now)
                home = backend.require(update.var)
                update.factor = factors.of(update.rule, home.device(update.var))
                rest.append((home, update, i in self._memory.overlapping))
            return launches + _plan_rest(rest)
        except BaseException:
            release(list(self._updates.values()))
            raise

    # ------------------------------------------------------------------------------------------------- gradients

    def _addressed(self, direct: _Direct, grads: Sequence[Tensor]) -> tuple[Sequence[Tensor], Array]:
        """Gradients that go by address, and where they are: copies of those that cannot be read as they lie."""
        pointers = addresses(grads)
        copied = self._memory.met_by(pointers, direct.n_bytes)
        copied[direct.unlike] = True
        if not copied.any():
            return grads, pointers
        found = list(grads)
        for k in np.flatnonzero(copied).tolist():
            found[k] = self._normal(direct.places[k], grads[k])
            pointers[k] = found[k].data_ptr()
        return found, pointers

    def _normal(self, i: int, grad: Tensor) -> Tensor:
        """A checked gradient, laid out like its parameter, in memory that the step does not write to."""
        var = self._own[i]
        what = f"the gradient of a parameter of shape {tuple(var.shape)}"
        if grad.layout not in (torch.strided, torch.sparse_coo):
            raise RuntimeError(f"{what}: expected it dense or sparse COO; got {grad.layout}")
        if grad.shape != var.shape or grad.device != var.device:
            raise RuntimeError(
                f"{what}, {var.device}: expected the same shape and device; got {tuple(grad.shape)}, {grad.device}"
            )
        if grad.dtype != var.dtype and not (var.element_size() == 2 and grad.dtype in (torch.float32, torch.float64)):
            raise RuntimeError(f"{what}: expected {var.dtype}; got {grad.dtype}")
        if grad.layout is torch.sparse_coo and grad.sparse_dim() == 0:
            grad = grad.to_dense()
        if grad.layout is torch.sparse_coo:
            return grad.clone() if self._is_written(grad._values()) else grad
        grad = grad.resolve_neg()
        if self._is_flat[i] and tensors.steps(grad) != tensors.steps(var):
            grad = torch.empty_like(var, dtype=grad.dtype, requires_grad=False).copy_(grad)
        if self._is_written(grad):
            grad = grad.clone()
        if grad.numel() and not grad.data_ptr():
            raise RuntimeError(f"{what}: a {type(grad).__name__} has no memory of its own")
        return grad

    def _is_written(self, tensor: Tensor) -> bool:
        return bool(self._memory.met_by(addresses([tensor]), np.array([reach(tensor)])).any())

    # -------------------------------------------------------------------------------------------------- updates

    def _update(self, i: int, now: Step, view: Callable[[Tensor], Tensor], kind: Any) -> Update:
        """The update of a parameter whose arrays are seen through ``view``; kept, with what kernels prepare in it."""
        update = self._updates.get((i, kind))
        compute = array_type(TYPES[self._own[i].dtype])
        rule = now.rule(compute, self.flags.has_momentum)
        if update is None:
            var, rms, *rest = (array(view(tensor)) for tensor in self._arrays[i])
            mom = rest.pop(0) if self.flags.has_momentum else None
            mg = rest.pop(0) if self.flags.centered else None
            update = self._updates[i, kind] = Update(var, rms, mom, mg, rule, grad=None)
        update.rule = rule
        return update

    def _filled(self, i: int, grad: Tensor, now: Step) -> Update:
        """The update of a parameter that does not go by address, with its gradient."""
        if grad.layout is torch.sparse_coo:
            n_sparse, rows = grad.sparse_dim(), tensors.rows(grad)
            update = self._update(i, now, lambda tensor: tensors.table(tensor, n_sparse), n_sparse)
            update.grad, update.indices = map(array, rows)
            home = backend.require(update.var)
            if home.device(update.var) is None:
                self._check_rows(update)
            return update
        if self._is_flat[i]:
            update = self._update(i, now, tensors.flat, "flat")
            update.grad = array(tensors.flat(grad))
        else:
            update = self._update(i, now, Tensor.detach, "strided")
            update.grad = array(grad)
        return update

    def _check_rows(self, update: Update) -> None:
        n_rows = update.var.shape[0]
        found = backend.require(update.var).first_outside([(update.indices, n_rows)])
        if found is not None:
            raise IndexError(
                f"the sparse gradient of a table of shape {update.var.shape} names row {update.indices[found[1]]} at "
                f"offset {found[1]}; expected rows in [0, {n_rows})"
            )

    def _make_direct(self, grads: Sequence[Tensor], now: Step) -> _Direct:
        """Send by address all that can be."""
        places: dict[backend.Backend, list[int]] = {}
        unlike = set()
        for i, grad in enumerate(grads):
            normal = self._normal(i, grad)
            if self._is_flat[i] and grad.layout is torch.strided:
                home = backend.require(self._filled(i, normal, now).var)
                places.setdefault(home, []).append(i)
                if grad.is_neg() or tensors.steps(grad) != tensors.steps(self._own[i]):
                    unlike.add(i)
        launches = []
        for home, at in places.items():
            updates = [self._updates[i, "flat"] for i in at]
            run = home.by_address(updates)
            release(updates)
            if run is not None:
                launches.append((run, home.device(updates[0].var) is None, at))
        return _Direct(launches, unlike, grads)


class _Direct:
    """Parameters that go by address, while their gradients look the same."""

    def __init__(
        self,
        launches: list[tuple[Callable[..., None], bool, list[int]]],
        unlike: set[int],
        grads: Sequence[Tensor],
    ) -> None:
        """``launches``: how to update by address, whether on the host, and whose gradients these are.

        ``unlike``: whose gradients are laid out in another way than they are, and have to be copied.
        """
        self.places = [i for _, _, at in launches for i in at]
        self._launches, first = [], 0
        for run, on_host, at in launches:
            self._launches.append((run, on_host, slice(first, first + len(at))))
            first += len(at)
        self._all = self.places == list(range(len(grads)))
        self.unlike = [k for k, i in enumerate(self.places) if i in unlike]
        self.others = sorted(set(range(len(grads))) - set(self.places))
        picked = self.picked(grads)
        self._looks = Looks(picked)
        self.n_bytes = np.array([reach(grad) for grad in picked], np.int64)

    def picked(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """Those of all gradients that go by address."""
        return grads if self._all else [grads[i] for i in self.places]

    def fit(self, grads: Sequence[Tensor]) -> bool:
        """Whether they look the same, where their layouts are."""
        return self._looks.fit(self.picked(grads))

    def launches(self, grads: Sequence[Tensor], pointers: Array, now: Step, factors: Factors) -> list[Launch]:
        """Of the picked gradients, which the launches keep alive."""
        return [partial(self._launch, grads, pointers, now, factors)] if self._launches else []

    def _launch(self, grads: Sequence[Tensor], pointers: Array, now: Step, factors: Factors) -> None:
        for run, on_host, at in self._launches:
            run(pointers[at], now, factors.host if on_host else factors.on_gpu)


def _plan_rest(rest: Sequence[tuple[backend.Backend, Update, bool]]) -> list[Launch]:
    """One plan per library; of parameters that share memory, one after the other."""
    batches: dict[Any, tuple[backend.Backend, list[Update]]] = {}
    for i, (home, update, shares) in enumerate(rest):
        batches.setdefault(i if shares else home, (home, []))[1].append(update)
    return [partial(_apply, home.plan_unsent(updates), updates) for home, updates in batches.values()]


def _apply(plan: Callable[[], None], updates: list[Update]) -> None:
    plan()
    release(updates)
