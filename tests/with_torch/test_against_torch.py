"""The same curve as `torch.optim.RMSprop`: torch's own cases, recorded runs, and training on real data."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gpurms.kernels.cpu import use_engine
from gpurms.torch import RMSprop
from tests.with_torch.support import SLOTS, Comparison, clones, gradients, parameters, step

CASES: dict[str, dict[str, Any]] = {  # those of torch's OptimizerInfo for RMSprop, and momentum by itself
    "default": {},
    "lr": {"lr": 1e-3},
    "weight_decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "centered": {"weight_decay": 0.1, "centered": True},
    "maximize, weight_decay": {"weight_decay": 0.1, "maximize": True},
    "momentum": {"weight_decay": 0.1, "centered": True, "momentum": 0.1},
    "all": {"weight_decay": 0.1, "centered": True, "momentum": 0.1, "maximize": True},
    "capturable": {"capturable": True},
    "capturable, maximize": {"weight_decay": 0.1, "maximize": True, "capturable": True},
    "tensor lr, capturable": {"lr": torch.tensor(0.001), "capturable": True},
    "tensor lr": {"lr": torch.tensor(0.001), "momentum": 0.9},
}
SHAPES = ((4, 3), (7,), (), (0,), (2, 0, 3), (1, 1))


def for_torch(options: dict[str, Any], foreach: bool | None) -> dict[str, Any]:
    """Torch refuses `capturable` on the CPU, where it changes nothing."""
    return {**options, "capturable": False, "foreach": foreach}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("dtype", "engine"), [(torch.float32, "numba"), (torch.float64, "numpy")], ids=str)
def test_hundred_steps(dtype: torch.dtype, engine: str, foreach: bool, case: str):
    ours = {**CASES[case], "foreach": foreach}
    with use_engine(engine):
        Comparison(parameters(dtype, SHAPES), ours, for_torch(ours, foreach)).run(100)


@pytest.mark.parametrize("case", ["all", "tensor lr"])
def test_types_side_by_side(case: str):
    params = [each for dtype in (torch.float32, torch.float64) for each in parameters(dtype, SHAPES)]
    Comparison(params, CASES[case]).run(20)


@pytest.mark.parametrize("options", [{}, {"centered": True, "momentum": 0.5, "eps": 1e-3}], ids=["default", "all"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype: torch.dtype, options: dict[str, Any]):
    """Beside torch in float64: only the parameter is rounded, by half a unit per step.

    Torch's own state is of 16 bits, in which `eps` vanishes and small averages too.
    """
    [ours] = parameters(dtype, [(200,)])
    exact = ours.detach().double().requires_grad_()
    optimizers = [RMSprop([ours], **options), torch.optim.RMSprop([exact], **options)]
    largest = exact.detach().abs()
    for n in range(20):
        [grad] = gradients([ours], n)
        for optimizer, to in zip(optimizers, (dtype, torch.float64)):
            step(optimizer, [grad.to(to)])
        largest = largest.maximum(exact.detach().abs()).maximum(ours.detach().abs())
        error = (ours.detach().double() - exact.detach()).abs()
        assert (error <= (n + 1) * 0.5 * 1.01 * torch.finfo(dtype).eps * largest).all()


@pytest.mark.parametrize("foreach", [False, True])
def test_absent_gradients(foreach: bool):
    """Some at some steps: neither the parameter nor its state changes, nor its number of steps."""
    params = parameters(torch.float64, SHAPES)
    options = {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "foreach": foreach}
    comparison = Comparison(params, options)
    for n in range(24):
        grads: list[Tensor | None] = list(gradients(params, n))
        for i in range(len(grads)):
            if (n + i) % 3 == 0 or i == n // 4:
                grads[i] = None
        comparison.step(grads)
    counts = [float(comparison.left.state[param]["step"]) for param in params]
    assert counts == [sum((n + i) % 3 != 0 and i != n // 4 for n in range(24)) for i in range(len(params))]


def test_gradients_of_zeros():
    params = parameters(torch.float64, SHAPES)
    comparison = Comparison(params, {"momentum": 0.9})
    before = clones(params)
    comparison.step([torch.zeros_like(param) for param in params])
    for param, start in zip(params, before):
        assert torch.equal(param, start)
    for n in range(5):
        comparison.step([grad * (n % 2) for grad in gradients(params, n)])


def test_no_gradients_at_all():
    params = parameters(torch.float32)
    optimizer = RMSprop(params)
    optimizer.step()
    assert dict(optimizer.state) == {}


def test_groups_with_options_of_their_own():
    groups = [
        {},
        {"lr": 0.1, "momentum": 0.9},
        {"centered": True, "alpha": 0.5},
        {"maximize": True, "weight_decay": 0.5},
    ]
    ours = [parameters(torch.float64, seed=i) for i in range(len(groups))]
    theirs = [clones(params) for params in ours]
    optimizers = [
        make([{"params": params, **group} for params, group in zip(side, groups)], eps=1e-3)
        for make, side in ((RMSprop, ours), (torch.optim.RMSprop, theirs))
    ]
    for n in range(10):
        grads = [grad for params in ours for grad in gradients(params, n)]
        for optimizer in optimizers:
            step(optimizer, grads)
    for left, right in zip(chain(*ours), chain(*theirs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-13)


GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("torch_*.npz"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_recorded_run(path: Path, cpu_engine: str):
    with np.load(path, allow_pickle=False) as z:
        meta, arrays = json.loads(str(z["meta"])), {key: z[key] for key in z.files if key != "meta"}
    params = [torch.tensor(arrays[f"init__var_{i}"], requires_grad=True) for i in range(meta["n_vars"])]
    optimizer = RMSprop(params, **meta["hyper"])
    for t in range(meta["steps"]):
        step(optimizer, [torch.tensor(arrays[f"grad_{i}"][t]) for i in range(len(params))])
        for i, param in enumerate(params):
            state = optimizer.state[param]
            assert float(state["step"]) == t + 1
            for got, name in [(param, "var"), *((state[slot], SLOTS[slot]) for slot in state if slot in SLOTS)]:
                want = arrays[f"{name}_{i}"]
                scale = np.abs(want).max(0, initial=0)
                allowed = meta["tolerance"]["atol"] + meta["tolerance"]["rtol"] * np.maximum(abs(want[t]), scale)
                assert (np.abs(got.detach().numpy() - want[t]) <= allowed).all(), (t, i, name)


def test_sixteen_recorded_runs():
    assert len(GOLDEN) == 16


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small models: threads of torch wait by turning, beside those of other tests."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def digits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=dtype) / 16, torch.tensor(labels)


def train(make: Any, dtype: torch.dtype, n_epochs: int, **options: Any) -> tuple[list[float], float]:
    """Losses of all batches, and the accuracy on the digits not trained on, every fifth."""
    torch.manual_seed(0)
    images, labels = digits(dtype)
    held_out = torch.arange(len(labels)) % 5 == 0
    trained_on = (~held_out).nonzero()[:, 0]
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10)).to(dtype)
    optimizer = make(model.parameters(), **options)
    losses = []
    for _ in range(n_epochs):
        for at in trained_on[torch.randperm(len(trained_on))].split(96):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[at]), labels[at])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    with torch.no_grad():
        return losses, (model(images[held_out]).argmax(1) == labels[held_out]).double().mean().item()


TRAINING: dict[str, dict[str, Any]] = {
    "plain": {"lr": 3e-3},
    "all": {"lr": 2e-3, "centered": True, "momentum": 0.5, "weight_decay": 1e-4, "eps": 1e-4},
}


@pytest.mark.parametrize("case", TRAINING)
def test_digits(case: str, one_thread: None):
    ours, accuracy = train(RMSprop, torch.float64, 12, **TRAINING[case])
    theirs, _ = train(torch.optim.RMSprop, torch.float64, 12, **TRAINING[case])
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=0)
    assert accuracy > 0.95


@pytest.mark.parametrize("case", TRAINING)
def test_digits_in_float32(case: str, one_thread: None):
    """Rounding makes runs part: ours is as near to the run in float64 as torch's, within a factor."""
    ours, theirs = (train(make, torch.float32, 12, **TRAINING[case])[0] for make in (RMSprop, torch.optim.RMSprop))
    exact, _ = train(torch.optim.RMSprop, torch.float64, 12, **TRAINING[case])
    assert distance(ours, exact) <= 4 * distance(theirs, exact)
    assert distance(ours, theirs) <= 4 * distance(theirs, exact)


def distance(left: list[float], right: list[float]) -> float:
    found: float = np.abs(np.subtract(left, right)).max()
    return found
