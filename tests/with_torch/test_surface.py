"""All that torch's training loops do with an optimizer besides `step`."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from gpurms.kernels.cpu import use_engine
from gpurms.torch import RMSprop
from tests.with_torch.support import FULL, assert_same_run, clones, gradients, parameters, run, step

pytestmark = pytest.mark.usefixtures("numpy_engine")  # for nothing here depends on the engine


def both(**options: Any) -> tuple[RMSprop, torch.optim.Optimizer]:
    params = parameters(torch.float64, [(5,), (3, 2)])
    return RMSprop(params, **options), torch.optim.RMSprop(clones(params), **options)


def assert_close(*optimizers: torch.optim.Optimizer) -> None:
    sides = [[param for group in opt.param_groups for param in group["params"]] for opt in optimizers]
    for left, right in zip(*sides, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-13)


def test_signature_begins_with_torchs():
    ours, theirs = (list(inspect.signature(make).parameters.values()) for make in (RMSprop, torch.optim.RMSprop))
    strip = [[(each.name, each.default, each.kind) for each in side] for side in (ours[: len(theirs)], theirs)]
    assert strip[0] == strip[1]
    keyword_only = {each.name: each.default for each in ours[len(theirs) :] if each.kind is each.KEYWORD_ONLY}
    own = ("eps_in_sqrt", "lr_in_momentum", "nesterov", "decoupled_weight_decay")
    assert keyword_only == dict.fromkeys(own, False)
    assert len(ours) == len(theirs) + len(own)


def test_is_an_optimizer():
    ours, theirs = both(lr=0.5, momentum=0.5)
    assert isinstance(ours, torch.optim.Optimizer)
    assert repr(ours) == repr(theirs)
    assert ours.defaults == theirs.defaults


CHANGES: dict[str, dict[str, Any]] = {
    "lr": {"lr": 0.5},
    "tensor lr": {"lr": torch.tensor(0.5)},
    "alpha": {"alpha": 0.5},
    "eps": {"eps": 1.0},
    "weight decay on": {"weight_decay": 0.5},
    "momentum changed": {"momentum": 0.25},
    "momentum off": {"momentum": 0},
    "maximize": {"maximize": True},
    "centered off": {"centered": False},
    "foreach": {"foreach": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_options_changed_between_steps(change: str):
    optimizers = both(lr=0.05, momentum=0.5, centered=True, eps=1e-3)
    for optimizer in optimizers:
        run(optimizer, 3)
        optimizer.param_groups[0].update(CHANGES[change])
        run(optimizer, 3, first=3)
        optimizer.param_groups[0].update(lr=0.01, momentum=0.5, centered=True, maximize=False)
        run(optimizer, 3, first=6)
    assert_close(*optimizers)


@pytest.mark.parametrize(
    ("option", "value", "slot"), [("momentum", 0.5, "momentum_buffer"), ("centered", True, "grad_avg")]
)
def test_options_that_need_more_state(option: str, value: Any, slot: str):
    """Torch fails for want of the buffer; here it begins with zeros."""
    ours, theirs = both(eps=1e-3)
    for optimizer in (ours, theirs):
        run(optimizer, 3)
        optimizer.param_groups[0][option] = value
    for param in theirs.param_groups[0]["params"]:
        theirs.state[param][slot] = torch.zeros_like(param)
    for optimizer in (ours, theirs):
        run(optimizer, 3, first=3)
    assert_close(ours, theirs)


@pytest.mark.parametrize("option", ["nesterov", "eps_in_sqrt", "lr_in_momentum", "decoupled_weight_decay"])
def test_own_options_of_a_group(option: str):
    params = parameters(torch.float32, [(5,), (5,)])
    twins = clones(params)
    options = {"momentum": 0.5, "weight_decay": 0.25, "eps": 0.125}
    mixed = RMSprop([{"params": params[:1], option: True}, {"params": params[1:]}], **options)
    apart = RMSprop(twins[:1], **options, **{option: True}), RMSprop(twins[1:], **options)
    run(mixed, 3)
    for n in range(3):
        for each, grad in zip(apart, gradients(twins, n)):
            step(each, [grad])
    assert_same_run(params, twins)
    plain = RMSprop(clones(parameters(torch.float32, [(5,)])), **options)
    run(plain, 3)
    assert not torch.equal(params[0], plain.param_groups[0]["params"][0])


def test_groups_added_later():
    optimizers = both(lr=0.05)
    more = parameters(torch.float64, [(4,)], seed=1)
    for optimizer, params in zip(optimizers, (more, clones(more))):
        run(optimizer, 2)
        optimizer.add_param_group({"params": params, "lr": 0.5, "momentum": 0.5})
        run(optimizer, 3, first=2)
    assert_close(*optimizers)
    assert [len(group["params"]) for group in optimizers[0].param_groups] == [2, 1]


def test_groups_removed_and_reordered():
    """What has been prepared for a group is not used for another."""
    params = parameters(torch.float32, [(5,), (3,), (2,)])
    optimizer = RMSprop([{"params": [param]} for param in params], **FULL)
    twins = clones(params)
    others = [RMSprop([twin], **FULL) for twin in twins]
    grads, groups = gradients(params, 0), list(optimizer.param_groups)
    for order in ([0, 1, 2], [2, 0, 1], [2, 1], [0], [1, 0, 2]):
        optimizer.param_groups[:] = [groups[i] for i in order]
        step(optimizer, [grads[i] for i in order])
        for i in order:
            step(others[i], [grads[i]])
    assert_same_run(params, twins)


def test_named_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    named, plain = RMSprop(model.named_parameters()), RMSprop(clones(model.parameters()))
    for optimizer in (named, plain):
        run(optimizer, 2)
    assert_same_run(list(model.parameters()), plain.param_groups[0]["params"])
    assert named.state_dict()["param_groups"][0]["param_names"] == [name for name, _ in model.named_parameters()]


def test_parameter_without_requires_grad():
    """As in torch, what has a gradient is updated, and what has none is not."""
    for make in (RMSprop, torch.optim.RMSprop):
        frozen, given = torch.ones(3), torch.ones(3)
        optimizer = make([frozen, given], lr=0.5, alpha=0.0, eps=0.0)
        given.grad = torch.ones(3)
        optimizer.step()
        assert frozen.tolist() == [1.0] * 3
        assert given.tolist() == [0.5] * 3
        assert frozen not in optimizer.state


def test_parameter_that_retains_its_gradient():
    for make in (RMSprop, torch.optim.RMSprop):
        leaf = torch.ones(3, requires_grad=True)
        inner = leaf * 2
        inner.retain_grad()
        optimizer = make([inner], lr=0.5, alpha=0.0, eps=0.0)
        inner.sum().backward()
        optimizer.step()
        assert inner.tolist() == [1.5] * 3


def test_lazy_parameters():
    torch.manual_seed(0)
    model = nn.LazyLinear(2)
    optimizer = RMSprop(model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool):
    model = nn.Linear(3, 2)
    optimizer, twin = RMSprop(model.parameters()), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    other = torch.optim.RMSprop(twin.parameters())
    for n in range(4):
        for each, opt in ((model, optimizer), (twin, other)):
            opt.zero_grad(set_to_none=set_to_none)
            assert all(
                (param.grad is None) if set_to_none or n == 0 else not param.grad.any() for param in each.parameters()
            )
            each(torch.ones(1, 3) * n).square().sum().backward()
            opt.step()
    for left, right in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(left, right)


def test_closure():
    """Called once, before anything else, with gradients on; its value is returned."""
    [param] = parameters(torch.float64, [(4,)])
    [twin] = clones([param])
    losses: list[list[Tensor]] = [[], []]
    for make, each, seen in zip((RMSprop, torch.optim.RMSprop), (param, twin), losses):
        optimizer = make([each], lr=0.1)

        def closure(optimizer=optimizer, each=each, seen=seen):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = ((each - 3) ** 2).sum()
            loss.backward()
            seen.append(loss)
            return loss

        for n in range(5):
            with torch.no_grad():
                assert optimizer.step(closure) is seen[-1]
                assert not torch.is_grad_enabled()
            assert len(seen) == n + 1
    torch.testing.assert_close(param, twin, rtol=1e-12, atol=0)
    torch.testing.assert_close(*map(torch.stack, losses), rtol=1e-12, atol=0)


def test_closure_that_evaluates_several_times():
    """A line search inside of the closure, which leaves a gradient and moves parameters."""
    [param] = parameters(torch.float64, [(4,)])
    [twin] = clones([param])

    def closure(each: Tensor) -> float:
        best = None
        for shrink in (1.0, 0.5):
            each.data *= shrink
            each.grad = None
            loss = (each**2).sum()
            loss.backward()
            best = loss.item()
        assert best is not None
        return best

    for make, each in ((RMSprop, param), (torch.optim.RMSprop, twin)):
        optimizer = make([each], momentum=0.5)
        results = [optimizer.step(lambda each=each: closure(each)) for _ in range(4)]
        assert results == sorted(results, reverse=True)
    torch.testing.assert_close(param, twin, rtol=1e-12, atol=0)


def test_hooks_around_steps():
    [param] = parameters(torch.float32, [(4,)])
    optimizer, calls = RMSprop([param]), []
    before = param.detach().clone()

    def pre(opt: Any, args: Any, kwargs: Any) -> Any:
        assert opt is optimizer
        calls.append(("pre", torch.equal(param, before)))
        return args, {**kwargs, "closure": lambda: 7.0}

    def post(opt: Any, args: Any, kwargs: Any) -> None:
        calls.append(("post", torch.equal(param, before)))

    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(lambda *_: calls.append(("global pre", None))),
        torch_optimizer.register_optimizer_step_post_hook(lambda *_: calls.append(("global post", None))),
        optimizer.register_step_pre_hook(pre),
        optimizer.register_step_post_hook(post),
    ]
    param.grad = torch.ones(4)
    try:
        assert optimizer.step() == 7.0
    finally:
        for handle in handles:
            handle.remove()
    assert calls == [("global pre", None), ("pre", True), ("post", False), ("global post", None)]
    assert optimizer.step() is None


def test_clipped_gradients():
    model = nn.Linear(30, 20)
    twin = nn.Linear(30, 20)
    twin.load_state_dict(model.state_dict())
    for each, make in ((model, RMSprop), (twin, torch.optim.RMSprop)):
        optimizer = make(each.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (100 * each(torch.ones(2, 30))).square().sum().backward()
            nn.utils.clip_grad_norm_(each.parameters(), 1.0)
            optimizer.step()
    for left, right in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(left, right)


def test_step_within_the_backward_pass():
    """One optimizer per parameter, whose gradient is gone before the next is made."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    twin = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    twin.load_state_dict(model.state_dict())
    optimizers = {param: RMSprop([param], **FULL) for param in model.parameters()}

    def hook(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(hook)
    whole, x = RMSprop(twin.parameters(), **FULL), torch.randn(16, 3)
    for _ in range(4):
        model(x).square().sum().backward()
        assert all(param.grad is None for param in model.parameters())
        whole.zero_grad()
        twin(x).square().sum().backward()
        whole.step()
    assert_same_run(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("within", ["function", "closure", "step alone"])
@pytest.mark.filterwarnings("ignore")  # of Dynamo's own, about torch
def test_compiled_training(within: str):
    """`torch.compile` of a whole training step: the optimizer's part runs as it is, between graphs."""
    losses = []
    for compile_it in (lambda f: f, torch.compile(backend="eager")):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer, x = RMSprop(model.parameters(), lr=0.05, momentum=0.5), torch.randn(4, 3)
        apply = compile_it(optimizer.step) if within == "step alone" else optimizer.step

        def evaluate(optimizer=optimizer, model=model, x=x):
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            return loss

        def train(apply=apply, evaluate=evaluate):
            if within == "closure":
                return apply(evaluate)
            loss = evaluate()
            apply()
            return loss

        train = train if within == "step alone" else compile_it(train)
        with use_engine("numba"):
            losses.append([train().item() for _ in range(4)])
    torch.compiler.reset()
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
