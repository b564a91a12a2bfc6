"""Any memory layout of parameters and gradients, and memory that they share: the same bits as contiguous tensors."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpurms.kernels.cpu import CHUNK
from gpurms.torch import RMSprop
from tests.with_torch.support import FULL, Core, assert_same_bits, clones, gradients, parameters, run, step

SHAPE = (2, 3, 4, 5)
Layout = Callable[[Tensor], Tensor]


def with_gaps(tensor: Tensor) -> Tensor:
    every_other = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7.0, dtype=tensor.dtype)[..., ::2]
    return every_other.copy_(tensor)


def in_a_row_of_a_larger_one(tensor: Tensor) -> Tensor:
    return torch.full((3, *tensor.shape), 7.0, dtype=tensor.dtype)[1].copy_(tensor)


def at_an_odd_address(tensor: Tensor) -> Tensor:
    return torch.full((tensor.numel() + 1,), 7.0, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


LAYOUTS: dict[str, Layout] = {
    "contiguous": torch.Tensor.contiguous,
    "channels last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "reversed": lambda tensor: tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "gaps": with_gaps,
    "transposed, gaps": lambda tensor: with_gaps(tensor.mT).mT,
    "row": in_a_row_of_a_larger_one,
    "odd address": at_an_odd_address,
}


def start() -> Tensor:
    return parameters(torch.float32, [SHAPE])[0].detach()


@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_parameter", LAYOUTS)
def test_layout(of_parameter: str, of_gradient: str, cpu_engine: str):
    param = LAYOUTS[of_parameter](start()).requires_grad_()
    optimizer, core = RMSprop([param], **FULL), Core([start()], **FULL)
    for n in range(3):
        grads = gradients([param], n)
        param.grad = LAYOUTS[of_gradient](grads[0])
        kept = param.grad.clone()
        optimizer.step()
        core.step(grads)
        assert torch.equal(param.grad, kept)
    core.assert_same_bits(optimizer)
    if "gaps" in of_parameter:
        assert (param._base == 7.0).sum() == param.numel()
    elif of_parameter in ("row", "odd address"):
        assert (param._base == 7.0).sum() == param._base.numel() - param.numel()


def test_all_layouts_in_one_group(cpu_engine: str):
    params = [layout(start()).requires_grad_() for layout in LAYOUTS.values()]
    optimizer, core = RMSprop(params, **FULL), Core([start()] * len(params), **FULL)
    for n in range(6):
        grads = gradients(params, n)
        layouts = list(LAYOUTS.values())
        for i, (param, grad) in enumerate(zip(params, grads)):
            param.grad = layouts[(i + n // 2) % len(layouts)](grad)
        optimizer.step()
        core.step(grads)
    core.assert_same_bits(optimizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_gaps_in_other_types(dtype: torch.dtype, cpu_engine: str):
    [base] = parameters(dtype, [SHAPE])
    param = with_gaps(base.detach()).requires_grad_()
    optimizer, core = RMSprop([param], **FULL), Core([base], **FULL)
    for n in range(3):
        step(optimizer, gradients([param], n))
        core.step(gradients([base], n))
    core.assert_same_bits(optimizer)


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded scalar": lambda param: torch.tensor(0.5).expand(param.shape),
    "expanded rows": lambda param: torch.arange(5.0).expand(param.shape),
    "expanded columns": lambda param: torch.arange(4.0)[:, None].expand(param.shape),
    "negated": lambda param: torch._neg_view(gradients([param], 0)[0]),
    "imaginary part": lambda param: torch.complex(*gradients([param, param], 0)).conj().imag,
    "zeros without memory": lambda param: torch._efficientzerotensor(param.shape),
    "requires grad": lambda param: gradients([param], 0)[0].requires_grad_(),
    "parameter of nn": lambda param: torch.nn.Parameter(gradients([param], 0)[0]),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_kinds_of_gradients(kind: str, cpu_engine: str):
    """In the same place where an ordinary one was in the step before, and the step after."""
    param = start().requires_grad_()
    optimizer, core = RMSprop([param], **FULL), Core([param], **FULL)
    for n in range(4):
        grad = GRADIENTS[kind](param) if n in (1, 2) else gradients([param], n)[0]
        param.grad = grad
        optimizer.step()
        core.step([grad.detach().resolve_neg().contiguous().clone()])
    core.assert_same_bits(optimizer)


def test_imaginary_parts_are_negated():
    """Or the case above tests nothing."""
    assert GRADIENTS["imaginary part"](start()).is_neg()
    assert GRADIENTS["negated"](start()).is_neg()


OVERLAPS: dict[str, tuple[int, Callable[[Tensor], list[Tensor]]]] = {  # elements, and the parameters among them
    "parts": (10, lambda base: [base[:6], base[4:]]),
    "inside": (10, lambda base: [base[2:4], base]),
    "the same": (10, lambda base: [base.view(5, 2), base]),
    "interleaved": (10, lambda base: [base[::2], base[1::2]]),
    "three": (10, lambda base: [base[0:4], base[2:6], base[4:8]]),
    "large, small": (1 << 16, lambda base: [base, base[:8]]),
    "large, small, with gaps": (1 << 17, lambda base: [base[::2], base[:8:2]]),
    "a piece for each thread": (CHUNK * 18 // 10, lambda base: [base[: CHUNK * 11 // 10], base[CHUNK * 8 // 10 :]]),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_parameters_that_share_memory(case: str, cpu_engine: str):
    """One after the other, as torch does without `foreach`."""
    n_elements, views = OVERLAPS[case]
    bases = [torch.linspace(-1, 1, n_elements, dtype=torch.float64) for _ in range(2)]
    options = {**FULL, "lr": 0.05, "weight_decay": 0.5}
    makes: list[Any] = [RMSprop, torch.optim.RMSprop]
    optimizers = []
    for make, base in zip(makes, bases):
        params = [view.detach().requires_grad_() for view in views(base)]
        optimizers.append(make(params, **options, foreach=False))
    for n in range(5 if n_elements == 10 else 2):
        grads = gradients([param for group in optimizers[0].param_groups for param in group["params"]], n)
        for optimizer in optimizers:
            step(optimizer, grads)
        torch.testing.assert_close(*bases, rtol=1e-12, atol=1e-13)


def test_gradient_that_is_the_parameter(cpu_engine: str):
    param, twin = (start().requires_grad_() for _ in range(2))
    for each in (param, twin):
        optimizer = RMSprop([each], **FULL)
        for _ in range(3):
            each.grad = each.detach() if each is param else each.detach().clone()
            optimizer.step()
    assert_same_bits(param, twin)


def test_gradient_in_memory_of_another_parameter(cpu_engine: str):
    """It counts as it was before the step, in whatever order parameters are updated."""
    memory = torch.linspace(-1, 1, 24)
    params = [memory[:8].clone().requires_grad_(), memory[8:16].clone().requires_grad_()]
    twins = clones(params)
    for n in range(3):
        grads = [params[1].detach().clone(), params[0].detach().clone()]
        if n == 0:
            ours, other = RMSprop(params, **FULL), RMSprop(twins, **FULL)
        params[0].grad, params[1].grad = params[1].detach(), params[0].detach()
        ours.step()
        step(other, grads)
    for param, twin in zip(params, twins):
        assert_same_bits(param, twin)


def test_gradient_in_memory_of_the_state(cpu_engine: str):
    [param] = parameters(torch.float32, [(6,)])
    [twin] = clones([param])
    ours, other = RMSprop([param], **FULL), RMSprop([twin], **FULL)
    for optimizer in (ours, other):
        run(optimizer, 1)
    param.grad = ours.state[param]["square_avg"]
    kept = param.grad.clone()
    ours.step()
    step(other, [kept])
    assert_same_bits(param, twin)


def test_gradients_that_share_memory(cpu_engine: str):
    """One tensor for two parameters."""
    params = [param for seed in range(2) for param in parameters(torch.float32, [(6,)], seed)]
    ours, core = RMSprop(params, **FULL), Core(params, **FULL)
    for n in range(2):
        [grad] = gradients(params[:1], n)
        for param in params:
            param.grad = grad
        ours.step()
        core.step([grad, grad])
    core.assert_same_bits(ours)


def swapped_for_a_copy(param: Tensor) -> None:
    param.data = param.data.clone()


def swapped_for_another_layout(param: Tensor) -> None:
    param.data = param.data.mT.contiguous().mT


def moved_within_its_storage(param: Tensor) -> None:
    param.data = torch.cat([param.data.flatten(), torch.zeros(3)])[: param.numel()].view(param.shape)


@pytest.mark.parametrize("change", [swapped_for_a_copy, swapped_for_another_layout, moved_within_its_storage])
def test_parameter_moved_between_steps(change: Callable[[Tensor], None], cpu_engine: str):
    """Its state goes with it, and nothing is written where it was."""
    param = start().requires_grad_()
    optimizer, core = RMSprop([param], **FULL), Core([param], **FULL)
    for n in range(4):
        grads = gradients([param], n)
        step(optimizer, grads)
        core.step(grads)
        old, kept = param.data, param.detach().clone()
        if n == 1:
            change(param)
            param.data += 1  # the old memory no longer says what the parameter is
            core.variables[0].assign(param.detach().numpy())
            assert torch.equal(old, kept)
            left_behind = old
    core.assert_same_bits(optimizer)
    assert not torch.equal(left_behind, param)


def test_same_memory_in_another_order(cpu_engine: str):
    """Of a parameter, or of its state."""
    params = parameters(torch.float32, [(4, 4), (4, 4)])
    optimizer, core = RMSprop(params, **FULL), Core(params, **FULL)
    for n in range(4):
        grads = gradients(params, n)
        step(optimizer, grads)
        core.step(grads)
        if n == 1:
            params[0].data = params[0].data.t()
            core.variables[0].assign(params[0].detach().numpy())
            state = optimizer.state[params[1]]
            state["square_avg"] = state["square_avg"].t()
            core.optimizer.get_slot(core.variables[1], "rms").assign(state["square_avg"].numpy())
    core.assert_same_bits(optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_model_changes_its_type(dtype: torch.dtype, cpu_engine: str):
    """As with torch, state stays in the type that it has."""
    ours, theirs = (torch.nn.Linear(3, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.05, "momentum": 0.5, "eps": 1e-3}
    optimizers = [RMSprop(ours.parameters(), **options), torch.optim.RMSprop(theirs.parameters(), **options)]
    for optimizer in optimizers:
        run(optimizer, 2)
    for model in (ours, theirs):
        model.zero_grad()
        model.to(dtype)
    for optimizer in optimizers:
        run(optimizer, 3, first=2)
    tolerance = 8 * torch.finfo(torch.bfloat16 if dtype is torch.bfloat16 else torch.float32).eps
    for left, right in zip(ours.parameters(), theirs.parameters()):
        assert left.dtype == dtype
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
        kinds = {name: value.dtype for name, value in optimizers[0].state[left].items()}
        assert kinds == dict.fromkeys(("step", "square_avg", "momentum_buffer"), torch.float32)


def test_model_moved_to_empty_memory():
    model = torch.nn.Linear(3, 2)
    optimizer = RMSprop(model.parameters(), **FULL)
    run(optimizer, 2)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0)
    twins = clones(model.parameters())
    other = torch.optim.RMSprop(twins, **FULL)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, other):
        run(each, 2, first=2)
    for left, right in zip(model.parameters(), twins):
        torch.testing.assert_close(left.detach(), right.detach(), rtol=1e-5, atol=1e-6)
