"""The parameters of one step and their slots, and how their gradients get to the kernels.

Parameters that fill their memory, with gradients in the same order of dimensions, go by their addresses: the usual
case, in which nothing is looked up or made from step to step. All others are prepared anew each time: tables with
sparse gradients, views with gaps, parameters that share memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpurms import backend
from gpurms.kernels.rule import Flags, Step, Update
from gpurms.torch import tensors
from gpurms.torch.memory import Array, Looks, Memory, addresses, reach
from gpurms.torch.scaling import Factors
from gpurms.torch.tensors import TYPES, array, array_type

Launch = Callable[[], None]

_layout = attrgetter("layout")


class Members:
    """Parameters, and of each what this rank holds of it and of its slots."""

    def __init__(
        self, parameters: list[Tensor], own: Sequence[Tensor], slots: list[Sequence[Tensor]], now: Step
    ) -> None:
        """``slots``: by name of the slot, then by parameter."""
        for var in own:
            if tensors.overlaps_itself(var):
                raise RuntimeError(f"a parameter of shape {tuple(var.shape)}: several of its elements share memory")
        self._parameters, self._own = parameters, own
        self._flags = now.flags
        written = [*own, *(slot for of_name in slots for slot in of_name)]
        self._looks, self._addresses = Looks(written), addresses(written)
        self._memory = Memory(written)
        self._arrays = list(zip(own, *slots))
        self._is_flat = [
            not self._memory.overlaps and tensors.is_dense(var) and all(slot.stride() == var.stride() for slot in rest)
            for var, *rest in self._arrays
        ]
        self._updates: dict[tuple[int, Any], Update] = {}
        self._direct: _Direct | None = None

    def are(self, parameters: list[Tensor]) -> bool:
        """Whether these are they, wherever they may be now."""
        return len(parameters) == len(self._parameters) and all(map(is_, parameters, self._parameters))

    def fit(self, parameters: list[Tensor], own: Sequence[Tensor], slots: list[Sequence[Tensor]], flags: Flags) -> bool:
        """Whether these are still they, where they were."""
        if not self.are(parameters):
            return False
        written = [*own, *(slot for of_name in slots for slot in of_name)]
        return flags == self._flags and np.array_equal(addresses(written), self._addresses) and self._looks.fit(written)

    def plan(self, grads: Sequence[Tensor], now: Step, factors: Factors) -> list[Launch]:
        """Check the gradients and prepare all updates; what is returned applies them, in order."""
        direct = self._direct
        if direct is None or not direct.fit(grads) or self._memory.met_by(*direct.reach(grads)).any():
            grads = [self._normal(i, grad) for i, grad in enumerate(grads)]
            if direct is None or not direct.fit(grads):
                direct = self._direct = self._make_direct(grads, now)
        launches = direct.launches(grads, now, factors)
        rest: list[tuple[backend.Backend, Update]] = []
        for i in direct.others:
            update = self._filled(i, self._normal(i, grads[i]), now)
            home = backend.require(update.var)
            update.factor = factors.of(update.rule, home.device(update.var))
            rest.append((home, update))
        try:
            return launches + self._plan_rest(rest)
        except BaseException:
            release([update for _, update in rest])
            raise

    # ------------------------------------------------------------------------------------------------- gradients

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
        if self._is_flat[i] and grad.stride() != var.stride():
            return torch.empty_like(var, dtype=grad.dtype, requires_grad=False).copy_(grad)
        return grad.clone() if self._is_written(grad) else grad

    def _is_written(self, tensor: Tensor) -> bool:
        return bool(self._memory.met_by(addresses([tensor]), np.array([reach(tensor)])).any())

    # -------------------------------------------------------------------------------------------------- updates

    def _update(self, i: int, now: Step, view: Callable[[Tensor], Tensor], kind: Any) -> Update:
        """The update of a parameter whose arrays are seen through ``view``; kept, with what kernels prepare in it."""
        update = self._updates.get((i, kind))
        compute = array_type(TYPES[self._own[i].dtype])
        rule = now.rule(compute, self._flags.has_momentum)
        if update is None:
            var, rms, *rest = (array(view(tensor)) for tensor in self._arrays[i])
            mom = rest.pop(0) if self._flags.has_momentum else None
            mg = rest.pop(0) if self._flags.centered else None
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
        for i, grad in enumerate(grads):
            if self._is_flat[i] and grad.layout is torch.strided:
                home = backend.require(self._filled(i, grad, now).var)
                places.setdefault(home, []).append(i)
        launches = []
        for home, at in places.items():
            updates = [self._updates[i, "flat"] for i in at]
            run = home.by_address(updates)
            release(updates)
            if run is not None:
                launches.append((run, home.device(updates[0].var) is None, at))
        return _Direct(launches, grads)

    def _plan_rest(self, rest: Sequence[tuple[backend.Backend, Update]]) -> list[Launch]:
        """One plan per library; where parameters share memory one after the other."""
        if self._memory.overlaps:
            batches = [(home, [update]) for home, update in rest]
        else:
            by_home: dict[backend.Backend, list[Update]] = {}
            for home, update in rest:
                by_home.setdefault(home, []).append(update)
            batches = list(by_home.items())
        launches: list[Launch] = []
        for home, updates in batches:
            launches.append(_releasing(home.plan_unsent(updates), updates))
        return launches


class _Direct:
    """Parameters that go by address, while their gradients look the same."""

    def __init__(self, launches: list[tuple[Callable[..., None], bool, list[int]]], grads: Sequence[Tensor]) -> None:
        """``launches``: how to update by address, whether on the host, and whose gradients these are."""
        places = [i for _, _, at in launches for i in at]
        self._launches, first = [], 0
        for run, on_host, at in launches:
            self._launches.append((run, on_host, slice(first, first + len(at))))
            first += len(at)
        self._places = None if places == list(range(len(grads))) else places
        self.others = sorted(set(range(len(grads))) - set(places))
        self._layouts = list(map(_layout, grads))
        self._looks = Looks(self._picked(grads))
        self._n_bytes = np.array([reach(grad) for grad in self._picked(grads)], np.int64)

    def _picked(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        return grads if self._places is None else [grads[i] for i in self._places]

    def fit(self, grads: Sequence[Tensor]) -> bool:
        """Whether the same gradients go by address, and look the same."""
        if list(map(_layout, grads)) != self._layouts or any(map(Tensor.is_neg, grads)):
            return False
        return self._looks.fit(self._picked(grads))

    def reach(self, grads: Sequence[Tensor]) -> tuple[Array, Array]:
        """Where they begin, and their bytes."""
        return addresses(self._picked(grads)), self._n_bytes

    def launches(self, grads: Sequence[Tensor], now: Step, factors: Factors) -> list[Launch]:
        """Of these gradients, which the launches keep alive."""
        picked = self._picked(grads)
        return [partial(self._launch, picked, addresses(picked), now, factors)] if self._launches else []

    def _launch(self, grads: Sequence[Tensor], pointers: Array, now: Step, factors: Factors) -> None:
        for run, on_host, at in self._launches:
            run(pointers[at], now, factors.host if on_host else factors.on_gpu)


def release(updates: Sequence[Update]) -> None:
    """Let go of gradients, which would otherwise live until the next step."""
    for update in updates:
        update.grad = update.indices = update.factor = None


def _releasing(plan: Callable[[], None], updates: list[Update]) -> Launch:
    def run() -> None:
        plan()
        release(updates)

    return run
