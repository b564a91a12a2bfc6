"""Parameters with gradients, and optimizers side by side: `gpurms.torch`, `torch.optim` and `gpurms` itself."""

import copy
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

import gpurms
from gpurms.torch import RMSprop

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((3, 2), (5,), (), (2, 0), (1,))

SLOTS = {"square_avg": "rms", "momentum_buffer": "momentum", "grad_avg": "mg"}

FULL: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "centered": True, "momentum": 0.5}
"""All kinds of state."""


def parameters(dtype: torch.dtype, shapes: Iterable[tuple[int, ...]] = SHAPES, seed: int = 0) -> list[Tensor]:
    """The same for the same seed."""
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.normal(size=shape)).to(dtype).requires_grad_() for shape in shapes]


def clones(params: Iterable[Tensor]) -> list[Tensor]:
    """In memory of their own, in the same layout."""
    return [param.detach().clone().requires_grad_(param.requires_grad) for param in params]


def gradients(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    rng = np.random.default_rng((seed, 1))
    return [torch.tensor(rng.normal(size=param.shape)).to(param.dtype) for param in params]


def step(optimizer: torch.optim.Optimizer, grads: Sequence[Tensor | None]) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()
    optimizer.step()


def run(optimizer: torch.optim.Optimizer, n_steps: int, first: int = 0) -> None:
    """Steps with gradients that depend on nothing but their number."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for n in range(first, first + n_steps):
        step(optimizer, gradients(params, n))


def numpy(tensor: Tensor) -> np.ndarray:
    """Sharing memory."""
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_same_bits(got: Tensor, want: Tensor | np.ndarray) -> None:
    left, right = numpy(got), want if isinstance(want, np.ndarray) else numpy(want)
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert left.tobytes() == right.tobytes(), f"got {left}, want {right}"


def assert_same_run(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """To the bit."""
    for left, right in zip(ours, theirs, strict=True):
        assert_same_bits(left, right)


class Core:
    """`gpurms.RMSprop` with torch's rule, on NumPy arrays: what `gpurms.torch` has to equal to the bit."""

    def __init__(self, params: Iterable[Tensor], **options: Any) -> None:
        names = {"lr": "learning_rate", "alpha": "rho", "eps": "epsilon"}
        of_torch = {"lr": 0.01, "alpha": 0.99, "eps": 1e-8, **options}
        rule = {"eps_in_sqrt": False, "lr_in_momentum": False, "decoupled_weight_decay": False}
        self.optimizer = gpurms.RMSprop(**{**rule, **{names.get(key, key): of_torch[key] for key in of_torch}})
        self.variables = [gpurms.Variable(numpy(param).copy()) for param in params]

    def step(self, grads: Sequence[Any]) -> None:
        """Gradients are tensors, `IndexedSlices` or None."""
        arrays = [numpy(grad) if isinstance(grad, Tensor) else grad for grad in grads]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Gradients do not exist")
            self.optimizer.apply_gradients(list(zip(arrays, self.variables, strict=True)))

    def assert_same_bits(self, optimizer: torch.optim.Optimizer) -> None:
        """Parameters and all state."""
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for param, variable in zip(params, self.variables, strict=True):
            assert_same_bits(param, variable.numpy())
            state = optimizer.state.get(param)
            if state is not None:
                assert [SLOTS[name] for name in state if name != "step"] == self.optimizer.get_slot_names()
                for name in state.keys() - {"step"}:
                    assert_same_bits(state[name], self.optimizer.get_slot(variable, SLOTS[name]).numpy())


class Comparison:
    """Steps `gpurms.torch` beside `torch.optim`, and asserts that they stay together.

    A step makes at most 4 roundings in `square_avg` and in `grad_avg` each, which last in all later steps, 4 in the
    normalised gradient and 2 in the momentum, half of the first behind a root. After n steps a normalised gradient is
    therefore wrong by less than 4n + 4 units, times the cancellation `square_avg / (square_avg - grad_avg**2)` if
    centered, a momentum by 2n more; and the parameter by that share of the way it has gone, plus one unit of its own
    per step. Both sides err.
    """

    def __init__(self, params: Sequence[Tensor], ours: dict[str, Any], theirs: dict[str, Any] | None = None) -> None:
        self.ours, self.theirs = list(params), clones(params)
        self.left = RMSprop(self.ours, **copy.deepcopy(ours))
        self.right = torch.optim.RMSprop(self.theirs, **copy.deepcopy(ours if theirs is None else theirs))
        self.n_steps = 0
        self.largest = [param.detach().abs().double() for param in self.ours]
        self.ways, self.moving, self.cancellations = (
            [torch.zeros(param.shape, dtype=torch.float64) for param in self.ours] for _ in range(3)
        )

    def run(self, n_steps: int) -> None:
        for _ in range(n_steps):
            self.step(gradients(self.ours, self.n_steps))

    def step(self, grads: Sequence[Tensor | None]) -> None:
        before = [param.detach().clone() for param in self.ours]
        momenta = [self.slot(i, "momentum_buffer") for i in range(len(before))]
        step(self.left, grads)
        step(self.right, grads)
        self.n_steps += 1
        group = self.left.param_groups[0]
        for i, param in enumerate(self.ours):
            gone = (param.detach() - before[i]).abs().double()
            if group["momentum"]:
                kick = float(group["lr"]) * (self.slot(i, "momentum_buffer") - group["momentum"] * momenta[i]).abs()
                self.moving[i] = group["momentum"] * self.moving[i] + kick
                gone = gone + self.moving[i]
            self.ways[i] += gone
            square, mean = self.slot(i, "square_avg"), self.slot(i, "grad_avg")
            cancellation = (square / (square - mean * mean)).nan_to_num(nan=1.0)
            self.cancellations[i] = self.cancellations[i].maximum(cancellation)
            self.largest[i] = self.largest[i].maximum(param.detach().abs().double())
        self.assert_close()

    def slot(self, i: int, name: str) -> Tensor:
        param = self.ours[i]
        found = self.left.state.get(param, {}).get(name)
        return torch.zeros(param.shape, dtype=torch.float64) if found is None else found.double()

    def assert_close(self) -> None:
        n = self.n_steps
        for i, (ours, theirs) in enumerate(zip(self.ours, self.theirs)):
            assert ours.dtype == theirs.dtype
            unit = torch.finfo(ours.dtype).eps
            bound = unit * ((6 * n + 4) * self.cancellations[i] * self.ways[i] + n * self.largest[i])
            difference = (ours.double() - theirs.double()).abs()
            assert (difference <= 2 * bound).all(), (n, difference, 2 * bound)
            mine, other = self.left.state.get(ours, {}).get("step"), self.right.state.get(theirs, {}).get("step")
            assert (mine is None) == (other is None)
            assert mine is None or (mine == other and mine.dtype == other.dtype)


class Snapshot:
    """All that a step may change: parameters, gradients, state, options; of tensors also which object each is."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.before = self.take()

    def take(self) -> Any:
        groups = self.optimizer.param_groups
        params = [param for group in groups for param in group["params"]]
        return (
            [(_content(param), _content(param.grad), param._version) for param in params],
            [{name: _content(value) for name, value in of.items()} for of in self.optimizer.state.values()],
            [{name: _content(value) for name, value in group.items()} for group in groups],
        )

    def assert_unchanged(self) -> None:
        for before, now in zip(self.before, self.take(), strict=True):
            assert before == now


class _Identity:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value


def _content(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_content, value))
    if not isinstance(value, Tensor):
        return repr(value)  # in which NaN is itself
    if value.layout is torch.sparse_coo:
        return _Identity(value), _bits(value._indices()), _bits(value._values())
    return _Identity(value), _bits(value)


def _bits(tensor: Tensor) -> Any:
    if tensor.is_meta:
        return tensor.dtype, tensor.shape
    contiguous = tensor.detach().to_dense().contiguous().reshape(-1)
    return tensor.dtype, tensor.shape, tensor.layout, contiguous.view(torch.uint8).numpy().tobytes()
