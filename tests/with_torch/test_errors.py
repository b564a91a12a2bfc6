"""What is refused: with torch's own exceptions, and nothing has changed."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpurms.torch import RMSprop, tensors
from tests.with_torch.support import FULL, Snapshot, gradients, parameters, run

pytestmark = pytest.mark.usefixtures("numpy_engine")  # for nothing here depends on the engine

NAN = float("nan")


def param() -> Tensor:
    return torch.ones(2, 1, requires_grad=True)


BAD_ARGUMENTS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    **{
        f"{name}={value}": (lambda name=name, value=value: ([param()], {name: value}))
        for name in ("lr", "alpha", "eps", "momentum", "weight_decay")
        for value in (-1.0, NAN, float("-inf"))
    },
    "lr of two elements": lambda: ([param()], {"lr": torch.tensor([0.001, 0.001])}),
    "lr of no elements": lambda: ([param()], {"lr": torch.tensor([])}),
    "tensor lr < 0": lambda: ([param()], {"lr": torch.tensor(-1.0)}),
    "tensor lr of NaN": lambda: ([param()], {"lr": torch.tensor(NAN)}),
    "no iterable": lambda: (param(), {}),
    "no parameters": lambda: ([], {}),
    "no tensor": lambda: ([param(), 1.0], {}),
    "no leaf": lambda: ([param() * 2], {}),
    "set": lambda: ([{"params": {param()}}], {}),
    "unknown argument": lambda: ([param()], {"beta": 0.9}),
    "some names": lambda: ([("weight", param()), param()], {}),
    "some groups with names": lambda: ([{"params": [param()], "lr": 1e-2}, {"params": [("weight", param())]}], {}),
    "twice in two groups": lambda: ([{"params": (p := param())}, {"params": p}], {}),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_arguments(case: str):
    """The same type and words as of `torch.optim.RMSprop`."""
    errors = []
    for make in (RMSprop, torch.optim.RMSprop):
        args, kwargs = BAD_ARGUMENTS[case]()
        with pytest.raises((ValueError, TypeError)) as caught:
            make(args, **kwargs)
        errors.append((caught.type, str(caught.value).replace("set()", "")))
    assert errors[0][0] is errors[1][0]
    if case not in ("set", "unknown argument"):
        assert errors[0] == errors[1]


@pytest.mark.parametrize("name", ["lr", "alpha", "eps", "momentum", "weight_decay"])
@pytest.mark.parametrize("value", [None, "0.1", [0.1]])
def test_arguments_of_wrong_types(name: str, value: Any):
    for make in (RMSprop, torch.optim.RMSprop):
        with pytest.raises(TypeError):
            make([param()], **{name: value})


def test_twice_in_one_group():
    for make in (RMSprop, torch.optim.RMSprop):
        p = param()
        with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
            make([p, p])


def test_twice_in_one_group_is_updated_twice():
    """As the warning says, for now; so does torch."""
    params = [torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for make, p in zip((RMSprop, torch.optim.RMSprop), params):
        with pytest.warns(UserWarning, match="duplicate"):
            optimizer = make([p, p], foreach=False)
        for n in range(3):
            [p.grad] = gradients([p], n)
            optimizer.step()
    torch.testing.assert_close(*params, rtol=1e-12, atol=0)


def test_differentiable():
    """As the fused optimizers of torch refuse it."""
    with pytest.raises(RuntimeError, match="differentiable"):
        torch.optim.Adam([param()], fused=True, differentiable=True)
    with pytest.raises(RuntimeError, match="differentiable=True is not supported"):
        RMSprop([param()], differentiable=True)


TENSORS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), "got torch.complex64"),
    "integer": (lambda: torch.ones(3, dtype=torch.int32), "got torch.int32"),
    "bool": (lambda: torch.ones(3, dtype=torch.bool), "got torch.bool"),
    "float8": (lambda: torch.ones(3).to(torch.float8_e4m3fn), "got torch.float8_e4m3fn"),
    "meta": (lambda: torch.ones(3, device="meta"), "expected it on the CPU or CUDA; got meta"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "expected a strided tensor; got torch.sparse_coo"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_parameters(case: str):
    make, message = TENSORS[case]
    with pytest.raises(RuntimeError, match=r"a parameter of shape \(3.*" + message):
        RMSprop([make()])


@pytest.mark.parametrize("case", TENSORS)
def test_groups_added(case: str):
    optimizer = RMSprop([param()])
    run(optimizer, 1)
    snapshot = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=TENSORS[case][1]):
        optimizer.add_param_group({"params": [param(), TENSORS[case][0]()]})
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    ("group", "error"),
    [
        ({"lr": -1.0}, ValueError),
        ({"momentum": NAN}, ValueError),
        ({"lr": torch.ones(2)}, ValueError),
        ({"differentiable": True}, RuntimeError),
    ],
    ids=str,
)
def test_options_of_groups_added(group: dict[str, Any], error: type[Exception]):
    optimizer = RMSprop([param()])
    run(optimizer, 1)
    snapshot = Snapshot(optimizer)
    with pytest.raises(error):
        optimizer.add_param_group({"params": [param()], **group})
    snapshot.assert_unchanged()


def test_parameter_whose_elements_share_memory():
    for make in (RMSprop, torch.optim.RMSprop):
        expanded = torch.ones(1).expand(3, 2).requires_grad_()
        expanded.grad = torch.ones(3, 2)
        optimizer = make([expanded])
        with pytest.raises(RuntimeError, match="memory"):
            optimizer.step()
        assert (expanded == 1).all()
    assert dict(RMSprop([expanded]).state) == {}


# --- steps --------------------------------------------------------------------------------------------------


class Foreign(nn.Parameter):
    """A parameter with any gradient; torch itself lets only matching ones be assigned."""

    assigned: Any = None

    @property
    def grad(self) -> Any:
        return self.assigned


def three_groups(*, middle: Tensor | None = None, **options: Any) -> RMSprop:
    """The one in the middle is to be spoiled; two steps have been made."""
    params = parameters(torch.float32, [(3, 2), (4, 2), (2,)])
    if middle is not None:
        params[1] = middle
    optimizer = RMSprop([{"params": [each]} for each in params], **FULL, **options)
    run(optimizer, 2)
    for each, grad in zip(params, gradients(params, 2)):
        each.grad = grad
    return optimizer


def second(optimizer: RMSprop) -> Tensor:
    found: Tensor = optimizer.param_groups[1]["params"][0]
    return found


def with_sparse(indices: Any, n_dense: int) -> Callable[[RMSprop], None]:
    def spoil(optimizer: RMSprop) -> None:
        indices_ = torch.tensor(indices)
        values = torch.ones(indices_.shape[1], *(2,) * n_dense)
        second(optimizer).grad = torch.sparse_coo_tensor(indices_, values, (4, 2), check_invariants=False)

    return spoil


def option(name: str, value: Any) -> Callable[[RMSprop], None]:
    return lambda optimizer: optimizer.param_groups[1].__setitem__(name, value)


def state(name: str, value: Any) -> Callable[[RMSprop], None]:
    return lambda optimizer: optimizer.state[second(optimizer)].__setitem__(name, value)


def gone(name: str) -> Callable[[RMSprop], None]:
    return lambda optimizer: optimizer.param_groups[1].__delitem__(name)


STEPS: dict[str, tuple[Callable[[RMSprop], None], type[Exception], str]] = {
    "row too large": (with_sparse([[1, 4]], 1), IndexError, r"names row 4 at offset 1; expected rows in \[0, 4\)"),
    "row < 0": (with_sparse([[-1]], 1), IndexError, r"names row -1 at offset 0"),
    "element too far": (with_sparse([[1, 1], [0, 2]], 0), IndexError, r"at offset 1; expected rows in \[0, 8\)"),
    "element < 0": (with_sparse([[1], [-1]], 0), IndexError, "at offset 0"),
    "row of an element too large": (with_sparse([[4], [0]], 0), IndexError, "at offset 0"),
    **{
        f"{name}={value}": (option(name, value), ValueError, f"Invalid .*: {value}")
        for name in ("lr", "alpha", "eps", "momentum", "weight_decay")
        for value in (-1.0, NAN)
    },
    "tensor lr < 0": (option("lr", torch.tensor(-1.0)), ValueError, "Invalid learning rate"),
    "tensor lr of NaN": (option("lr", torch.tensor(NAN)), ValueError, "Invalid learning rate"),
    "lr of two elements": (option("lr", torch.ones(2)), ValueError, "Tensor lr must be 1-element"),
    "lr is None": (option("lr", None), TypeError, "'>=' not supported"),
    "differentiable": (option("differentiable", True), RuntimeError, "differentiable=True is not supported"),
    "no lr": (gone("lr"), KeyError, "lr"),
    "state of another shape": (state("square_avg", torch.ones(5)), RuntimeError, "'square_avg' does not fit"),
    "broadcastable state": (state("grad_avg", torch.ones(2)), RuntimeError, "'grad_avg' does not fit"),
    "integer state": (state("momentum_buffer", torch.ones(4, 2).int()), RuntimeError, "'momentum_buffer' does not fit"),
    "state elsewhere": (
        state("square_avg", torch.ones(4, 2, device="meta")),
        RuntimeError,
        "'square_avg' does not fit",
    ),
    "state is a number": (state("square_avg", 1.0), RuntimeError, "'square_avg': expected a tensor; got 1.0"),
    "step is a number": (state("step", 3), RuntimeError, "'step': expected a tensor of one element; got 3"),
    "step has two elements": (state("step", torch.zeros(2)), RuntimeError, "'step': expected a tensor of one element"),
    "step is nowhere": (
        state("step", torch.zeros((), device="meta")),
        RuntimeError,
        "'step': expected a tensor of one element",
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_steps(case: str):
    """Also in groups that come before; and a step with all put right goes on."""
    spoil, error, message = STEPS[case]
    optimizer, untouched = three_groups(), three_groups()
    good = {**optimizer.param_groups[1]}, {**optimizer.state[second(optimizer)]}, second(optimizer).grad
    spoil(optimizer)
    snapshot = Snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    snapshot.assert_unchanged()
    optimizer.param_groups[1].update(good[0])
    optimizer.state[second(optimizer)].update(good[1])
    second(optimizer).grad = good[2]
    optimizer.step()
    untouched.step()
    for left, right in zip(optimizer.param_groups, untouched.param_groups):
        assert torch.equal(left["params"][0], right["params"][0])


def test_parameter_cut_short(cpu_engine: str):
    """At the address where it was."""
    [param] = parameters(torch.float32, [(6,)])
    optimizer = RMSprop([param])
    run(optimizer, 2)
    param.data, param.grad = param.data[:4], torch.ones(4)
    snapshot = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"'square_avg' does not fit its parameter of shape \(4,\)"):
        optimizer.step()
    snapshot.assert_unchanged()


def test_step_of_lost_counts():
    """A parameter whose number of steps is missing begins anew to count; torch too needs it."""
    optimizer = three_groups()
    del optimizer.state[second(optimizer)]["step"]
    optimizer.step()
    assert [float(each["step"]) for each in optimizer.state.values()] == [3, 1, 3]


FOREIGN: dict[str, tuple[Callable[[], Tensor], str]] = {
    "CSR": (lambda: torch.eye(4)[:, :2].to_sparse_csr(), "expected it dense or sparse COO; got torch.sparse_csr"),
    "CSC": (lambda: torch.eye(4)[:, :2].to_sparse_csc(), "expected it dense or sparse COO; got torch.sparse_csc"),
    "BSR": (lambda: torch.eye(4)[:, :2].to_sparse_bsr((2, 2)), "got torch.sparse_bsr"),
    "shape": (lambda: torch.ones(4), r"expected the same shape and device; got \(4,\), cpu"),
    "device": (lambda: torch.ones(4, 2, device="meta"), r"expected the same shape and device; got \(4, 2\), meta"),
    "float64": (lambda: torch.ones(4, 2, dtype=torch.float64), "expected torch.float32; got torch.float64"),
    "float16": (lambda: torch.ones(4, 2, dtype=torch.float16), "expected torch.float32; got torch.float16"),
    "complex": (lambda: torch.ones(4, 2, dtype=torch.complex64), "expected torch.float32; got torch.complex64"),
    "sparse of another type": (lambda: torch.eye(4)[:, :2].double().to_sparse(), "expected torch.float32"),
    "sparse of another shape": (lambda: torch.eye(4).to_sparse(), "expected the same shape"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("n_steps", [0, 2])
@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR) tensor support is in beta")
def test_gradients(case: str, n_steps: int):
    make, message = FOREIGN[case]
    params = [*parameters(torch.float32, [(3, 2)]), Foreign(torch.ones(4, 2))]
    optimizer = RMSprop(params, **FULL)
    for n in range(n_steps):
        params[0].grad, params[1].assigned = gradients(params, n)
        optimizer.step()
    params[0].grad = torch.ones(3, 2)
    params[1].assigned = None
    snapshot = Snapshot(optimizer)
    params[1].assigned = make()
    with pytest.raises(RuntimeError, match=r"the gradient of a parameter of shape \(4, 2\).*" + message):
        optimizer.step()
    params[1].assigned = None
    snapshot.assert_unchanged()


def test_hooks_that_raise():
    optimizer = three_groups()
    snapshot = Snapshot(optimizer)

    def refuse(*_: Any) -> None:
        raise ZeroDivisionError

    handle = optimizer.register_step_pre_hook(refuse)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    handle.remove()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(refuse)
    snapshot.assert_unchanged()


def test_bfloat16_without_ml_dtypes(monkeypatch: pytest.MonkeyPatch):
    """Which NumPy needs to know the type."""
    [param] = parameters(torch.bfloat16, [(3,)])
    optimizer = RMSprop([param])
    param.grad = torch.ones_like(param)
    snapshot = Snapshot(optimizer)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "ml_dtypes", None)
        tensors.array_type.cache_clear()
        with pytest.raises(RuntimeError, match="bfloat16 tensors need ml_dtypes: pip install ml_dtypes"):
            optimizer.step()
    snapshot.assert_unchanged()
    optimizer.step()
