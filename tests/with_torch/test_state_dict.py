"""State goes from `gpurms.torch` to `torch.optim` and back, through files too, and into copies."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpurms.torch import RMSprop
from tests.with_torch.support import (
    DTYPES,
    FULL,
    Snapshot,
    assert_same_bits,
    assert_same_run,
    clones,
    gradients,
    parameters,
    run,
    step,
)

pytestmark = pytest.mark.usefixtures("numpy_engine")  # for nothing here depends on the engine

OWN = {"eps_in_sqrt": True, "lr_in_momentum": True, "nesterov": True, "decoupled_weight_decay": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True},
    "all": FULL,
}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def slots(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return [optimizer.state[param] for group in optimizer.param_groups for param in group["params"]]


@pytest.mark.parametrize("carry", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("first", "second"), [(RMSprop, torch.optim.RMSprop), (torch.optim.RMSprop, RMSprop)])
def test_continues_where_the_other_stopped(first: Any, second: Any, options: str, carry: Callable[[Any], Any]):
    params = parameters(torch.float64)
    begun = first(params, **OPTIONS[options])
    run(begun, 5)
    twins = clones(params)
    continued = second(twins)  # whose options come with the state
    continued.load_state_dict(carry(begun.state_dict()))
    for optimizer in (begun, continued):
        run(optimizer, 20, first=5)
    for left, right in zip(params, twins):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)
    for left, right in zip(slots(begun), slots(continued)):
        assert list(left) == list(right)
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-10, atol=1e-12)
            assert left[name].dtype == right[name].dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_names_and_layouts_as_torch(dtype: torch.dtype):
    params = parameters(dtype)
    params[0] = params[0].detach().t().contiguous().t().requires_grad_()
    ours, theirs = RMSprop(params, **FULL), torch.optim.RMSprop(clones(params), **FULL)
    for optimizer in (ours, theirs):
        run(optimizer, 1)
    left, right = ours.state_dict(), theirs.state_dict()
    for i, state in right["state"].items():
        assert list(left["state"][i]) == list(state)
        for name, value in state.items():
            mine = left["state"][i][name]
            assert (mine.dtype, mine.shape, mine.device) == (value.dtype, value.shape, value.device)
            assert mine.is_contiguous() == value.is_contiguous()
    assert left["param_groups"] == right["param_groups"]
    assert list(left) == list(right)


@pytest.mark.parametrize("carry", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_own_state_to_the_bit(dtype: torch.dtype, carry: Callable[[Any], Any]):
    """The float32 state of 16-bit parameters too, which `Optimizer.load_state_dict` by itself rounds."""
    params = parameters(dtype)
    begun = RMSprop(params, **FULL, **OWN)
    run(begun, 3)
    twins = clones(params)
    continued = RMSprop(twins)
    continued.load_state_dict(carry(begun.state_dict()))
    for left, right in zip(slots(begun), slots(continued), strict=True):
        for name in left:
            assert_same_bits(right[name], left[name])
    for optimizer in (begun, continued):
        run(optimizer, 3, first=3)
    assert_same_run(params, twins)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_from_torch_and_back(dtype: torch.dtype):
    """Torch's 16-bit state is taken as it is, widened; ours is rounded by torch."""
    params = parameters(dtype)
    theirs = torch.optim.RMSprop(params, eps=1e-3, momentum=0.5)
    run(theirs, 3)
    twins = clones(params)
    ours = RMSprop(twins)
    ours.load_state_dict(theirs.state_dict())
    for left, right in zip(slots(theirs), slots(ours), strict=True):
        for name in ("square_avg", "momentum_buffer"):
            assert_same_bits(right[name], left[name].to(torch.float32))
    run(ours, 3, first=3)
    back = torch.optim.RMSprop(clones(twins))
    back.load_state_dict(ours.state_dict())
    for left, right in zip(slots(ours), slots(back), strict=True):
        for name in ("square_avg", "momentum_buffer"):
            assert_same_bits(right[name], left[name].to(dtype))
    run(back, 1, first=6)


@pytest.mark.parametrize("count", [3, 3.0, torch.tensor(3.0), torch.tensor(3)])
def test_number_of_steps_as_old_versions_saved_it(count: Any):
    params = parameters(torch.float32)
    optimizer = RMSprop(params)
    run(optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = copy.deepcopy(count)
    optimizer.load_state_dict(saved)
    run(optimizer, 1)
    for state in slots(optimizer):
        assert torch.is_tensor(state["step"])
        assert state["step"] == 4
        assert state["step"].dtype == torch.float32


@pytest.mark.parametrize(
    "missing", ["momentum", "centered", "foreach", "maximize", "capturable", "differentiable", *OWN]
)
def test_options_that_old_versions_did_not_save(missing: str):
    """They are as constructed."""
    optimizer = RMSprop(parameters(torch.float32), momentum=0.5, centered=True, **OWN)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0][missing]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][missing] == optimizer.defaults[missing]
    run(optimizer, 1)


def test_state_of_torch_leaves_own_options_as_constructed():
    params = parameters(torch.float64)
    theirs = torch.optim.RMSprop(params, lr=0.25, momentum=0.5)
    run(theirs, 2)
    ours = RMSprop(clones(params), lr=0.5, nesterov=True)
    ours.load_state_dict(theirs.state_dict())
    [group] = ours.param_groups
    assert (group["lr"], group["momentum"], group["nesterov"], group["eps_in_sqrt"]) == (0.25, 0.5, True, False)


def test_saved_before_the_first_step():
    params = parameters(torch.float64)
    twins = clones(params)
    ours = RMSprop(twins)
    ours.load_state_dict(torch.optim.RMSprop(params, lr=0.25, momentum=0.5).state_dict())
    fresh = RMSprop(params, lr=0.25, momentum=0.5)
    for optimizer in (ours, fresh):
        run(optimizer, 2)
    assert_same_run(params, twins)


def wrong_number_of_parameters(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"].pop()


def wrong_number_of_groups(state: dict[str, Any]) -> None:
    state["param_groups"].append(state["param_groups"][0])


@pytest.mark.parametrize("spoil", [wrong_number_of_parameters, wrong_number_of_groups])
def test_state_of_another_model_is_refused(spoil: Callable[[Any], None]):
    """In torch's words."""
    messages = []
    for make in (RMSprop, torch.optim.RMSprop):
        optimizer = make(parameters(torch.float32))
        run(optimizer, 1)
        saved = copy.deepcopy(optimizer.state_dict())
        spoil(saved)
        snapshot = Snapshot(optimizer)
        with pytest.raises(ValueError, match="loaded state dict") as caught:
            optimizer.load_state_dict(saved)
        snapshot.assert_unchanged()
        messages.append(str(caught.value))
        run(optimizer, 1)
    assert messages[0] == messages[1]


def test_state_of_parameters_in_another_order():
    """As with torch it loads, shapes are not compared then; the step is refused, and changes nothing."""
    params = parameters(torch.float32, [(3, 2), (5,)])
    optimizer = RMSprop(params)
    run(optimizer, 1)
    other = RMSprop(params[::-1])
    other.load_state_dict(optimizer.state_dict())
    snapshot = Snapshot(other)
    with pytest.raises(RuntimeError, match=r"state 'square_avg' does not fit its parameter of shape \(5,\)"):
        other.step()
    snapshot.assert_unchanged()


def test_state_in_other_layouts():
    """Files do not tell how memory was laid out."""
    [param] = parameters(torch.float32, [(4, 3)])
    optimizer = RMSprop([param], **FULL)
    run(optimizer, 2)
    twin = param.detach().t().contiguous().t().requires_grad_()
    other = RMSprop([twin])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, other):
        run(each, 2, first=2)
    assert torch.equal(param, twin)
    assert slots(other)[0]["square_avg"].stride() == twin.stride()


def test_expanded_state():
    """Of which all elements are one: the step makes it whole."""
    [plain] = parameters(torch.float32, [(4, 3)])
    gaps = torch.zeros(4, 6)[:, ::2].copy_(plain.detach()).requires_grad_()
    for param in (plain, gaps):
        [twin] = clones([param])
        optimizer, other = RMSprop([param]), RMSprop([twin])
        optimizer.state[param] = {"step": torch.tensor(1.0), "square_avg": torch.tensor(0.5).expand(4, 3)}
        other.state[twin] = {"step": torch.tensor(1.0), "square_avg": torch.full((4, 3), 0.5)}
        for each in (optimizer, other):
            run(each, 2)
        assert torch.equal(param, twin)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("n_steps", [0, 2])
def test_copies_go_their_own_way(how: str, n_steps: int):
    """Copied with its parameters; neither writes to the memory of the other."""
    params = parameters(torch.float32)
    optimizer = RMSprop(params, **FULL, **OWN)
    run(optimizer, n_steps)
    twins, twin = COPIES[how]((params, optimizer))
    assert type(twin) is RMSprop
    assert twin.defaults == optimizer.defaults
    before = clones(params)
    run(twin, 2, first=n_steps)
    assert_same_run(params, before)
    run(optimizer, 2, first=n_steps)
    assert_same_run(params, twins)
    for left, right in zip(slots(optimizer), slots(twin), strict=True):
        for name in left:
            assert_same_bits(left[name], right[name])


def test_pickle_of_an_older_version():
    """Without the options that came later, and with numbers of steps as plain numbers."""
    params = parameters(torch.float32)
    optimizer = RMSprop(params, momentum=0.5)
    run(optimizer, 2)
    state = copy.deepcopy(optimizer.__getstate__())
    for name in ("maximize", "capturable", "differentiable", "foreach"):
        del state["param_groups"][0][name]
    for of in state["state"].values():
        of["step"] = 2
    old = RMSprop.__new__(RMSprop)
    old.__setstate__(state)
    for each in (old, optimizer):
        run(each, 2, first=2)
    assert_same_run([param for group in old.param_groups for param in group["params"]], params)


def test_hooks_see_and_change_what_is_saved_and_loaded():
    params = parameters(torch.bfloat16)
    optimizer, calls = RMSprop(params, **FULL), []
    run(optimizer, 1)

    def halve(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("load pre")
        state = copy.deepcopy(state)
        for of in state["state"].values():
            of["square_avg"] /= 2
        return state

    def double(loading: Any) -> None:
        calls.append("load post")
        for of in slots(loading):
            assert of["momentum_buffer"].dtype == torch.float32
            of["momentum_buffer"] *= 2

    def mark(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("save post")
        return {**state, "mark": 1}

    optimizer.register_state_dict_pre_hook(lambda _: calls.append("save pre"))
    optimizer.register_state_dict_post_hook(mark)
    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(double)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["mark"] == 1
    for _ in range(2):
        optimizer.load_state_dict(saved)
    assert calls == ["save pre", "save post", *["load pre", "load post"] * 2]
    for i, of in enumerate(slots(optimizer)):
        assert_same_bits(of["square_avg"], saved["state"][i]["square_avg"] / 2)


def test_loading_between_steps_drops_what_was_prepared():
    """Addresses of the state before; gradients in the same place as ever."""
    params = parameters(torch.float32)
    optimizer, other = RMSprop(params, **FULL), RMSprop(twins := clones(params), **FULL)
    saved = copy.deepcopy(optimizer.state_dict())
    grads = gradients(params, 0)
    for _ in range(2):
        step(optimizer, grads)
    stale = [dict(of) for of in slots(optimizer)]
    contents = [{name: value.clone() for name, value in of.items()} for of in stale]
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for param, twin in zip(params, twins):
            param.copy_(twin)
    for each in (optimizer, other):
        step(each, grads)
    assert_same_run(params, twins)
    for of, content in zip(stale, contents):
        assert all(torch.equal(of[name], content[name]) for name in of)
