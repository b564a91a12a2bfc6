"""Dense steps on a GPU: the bits of the CPU, one launch per type, no waiting, on torch's streams, in any layout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpurms.torch import RMSprop
from tests.with_torch.cuda_tensors import (
    DTYPES,
    RULES,
    Gpu,
    Twins,
    assert_same,
    bits,
    emulated,
    gaps,
    like,
    on_cpu,
    on_gpu,
    parameters,
    random,
    snapshot,
)

SHAPES = ((33, 5), (), (0, 3), (1031,))
SEEDS = range(8)
pytestmark = pytest.mark.usefixtures("numpy_engine")


def of_all_types() -> list[Tensor]:
    return [random(shape, dtype, seed=i) for dtype in DTYPES for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("rule", RULES)
def test_the_bits_of_the_cpu(rule: str, gpu: Gpu):
    twins = Twins(of_all_types(), **{"lr": 0.1, **RULES[rule]})
    for seed in (1, 2, 3):
        twins.step(like(twins.others, seed))
    twins.check()


def test_gradients_wider_than_their_parameters(gpu: Gpu):
    twins = Twins([random((40,), torch.float16), random((40,), torch.bfloat16)], lr=0.1)
    for both in (twins.mine, twins.others):
        both[0].grad_dtype, both[1].grad_dtype = torch.float32, torch.float64
    twins.step([random((40,), torch.float32, 1), random((40,), torch.float64, 2)])
    twins.check()


# ------------------------------------------------------------------------------------------ launches, waiting, memory


def test_one_launch_for_each_type():
    with emulated() as gpu:
        twins = Twins(of_all_types(), momentum=0.9)
        for seed in (1, 2):
            twins.set_grads(like(twins.others, seed))
            gpu.machine.forget()
            twins.opt.step()
        launched = [launch.name for launch in gpu.machine.launches]
        assert launched == ["multi"] * len(DTYPES) + ["torch.fill_.Scalar", "torch._foreach_add_.Tensor"]
        assert gpu.machine.copies == []


def test_nothing_is_waited_for(gpu: Gpu):
    twins = Twins(of_all_types(), momentum=0.9)
    twins.set_grads(like(twins.others, 1))
    with gpu.nothing_waited_for():
        twins.opt.step()
        with gpu.no_memory_from_cupy():
            twins.opt.step()


def test_steps_are_counted_on_the_device(gpu: Gpu):
    twins = Twins([random((5,))])
    for seed in (1, 2):
        twins.step([random((5,), seed=seed)])
    (state,) = twins.opt.state.values()
    assert state["step"].is_cuda
    assert (state["step"].dtype, state["step"].shape, state["step"].item()) == (torch.float32, (), 2.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_on_the_current_stream(seed: int):
    """Gradients are made on it just before; a kernel elsewhere would not see them in all of these orders."""
    with emulated(deferred=True, seed=seed) as gpu:
        twins = Twins([random((70,)), random((30, 4), torch.float16)[:, ::2]], lr=0.1)
        side = torch.cuda.Stream()
        for count in (1, 2):
            grads = like(twins.others, count)
            with torch.cuda.stream(side), gpu.nothing_waited_for():
                for mine, other, grad in zip(twins.mine, twins.others, grads):
                    other.grad, mine.grad = grad, torch.empty_like(mine)
                    mine.grad.copy_(grad, non_blocking=True)
                twins.opt.step()
            twins.reference.step()
        side.synchronize()
        twins.check()


def test_work_of_another_stream_is_not_ordered():
    """What the test above would find."""
    found = set()
    for seed in SEEDS:
        with emulated(deferred=True, seed=seed):
            w = on_gpu(torch.zeros(5))
            w.grad = torch.zeros_like(w)
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                w.grad.fill_(1)
            RMSprop([w.requires_grad_()], lr=1, alpha=0).step()
            torch.cuda.synchronize()
            found.add(bits(w))
    assert len(found) == 2


# ------------------------------------------------------------------------------------------------------------ devices


def placed(tensors: list[Tensor], places: list[int | None]) -> list[Tensor]:
    """Copies on devices; None is the CPU."""
    made = [on_cpu(x) if place is None else on_gpu(x, place) for x, place in zip(tensors, places)]
    return [tensor.requires_grad_() for tensor in made]


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_devices_and_the_host_in_one_group(seed: int):
    """Each on its own current stream."""
    shapes, places = [(33, 5), (7,), (4, 4), (12,)], [0, 1, None, 1]
    start = [random(shape, seed=i) for i, shape in enumerate(shapes)]
    with emulated(2, deferred=True, seed=seed):
        mine, others = placed(start, places), placed(start, [None] * 4)
        optimizers = [RMSprop(each, lr=0.1, momentum=0.9, weight_decay=0.1) for each in (mine, others)]
        streams = [torch.cuda.Stream(0), torch.cuda.Stream(1)]
        with torch.cuda.stream(streams[0]), torch.cuda.stream(streams[1]):
            for step in (1, 2):
                grads = like(others, step)
                for each, other, grad in zip(mine, others, grads):
                    each.grad, other.grad = torch.empty_like(each), grad
                    each.grad.copy_(grad, non_blocking=True)
                for optimizer in optimizers:
                    optimizer.step()
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        assert_same(*optimizers)


def test_the_current_device_stays():
    with emulated(2):
        w = on_gpu(random((5,)), 1).requires_grad_()
        w.grad = torch.ones_like(w)
        RMSprop([w]).step()
        assert torch.cuda.current_device() == 0


def test_a_parameter_that_has_moved():
    with emulated(2):
        twins = Twins([random((5,)), random((3, 3))], momentum=0.9)
        twins.step(like(twins.others, 1))
        saved = twins.opt.state_dict()
        for mine in twins.mine:
            mine.grad = None
            mine.data = on_gpu(mine, 1)
        twins.set_grads(like(twins.others, 2))
        before = snapshot(twins.opt)
        with pytest.raises(RuntimeError, match=r"state 'square_avg' does not fit.*on cuda:1: got .* on cuda:0"):
            twins.opt.step()
        assert snapshot(twins.opt) == before
        twins.opt.load_state_dict(saved)
        twins.opt.step()
        twins.reference.step()
        twins.check()
        assert all(slot.device.index == 1 for state in twins.opt.state.values() for slot in state.values())


# ------------------------------------------------------------------------------------------------------------ layouts


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": Tensor.clone,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "gaps": gaps,
    "behind an offset": lambda x: torch.cat([torch.zeros(1, dtype=x.dtype), x.reshape(-1)])[1:].view(x.shape),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, gpu: Gpu):
    """Of parameters, and of gradients that lie as their parameter does, or not."""
    start = [LAYOUTS[layout](random((3, 4, 5, 2), dtype, i)) for i in range(3)]
    twins = Twins(start, lr=0.1, momentum=0.9, centered=True, weight_decay=0.1)
    makers = (LAYOUTS[layout], Tensor.clone, gaps)
    for seed in (1, 2):
        twins.step([make(random((3, 4, 5, 2), dtype, 7 * seed + i)) for i, make in enumerate(makers)])
    twins.check()
    for mine, other in zip(twins.mine, twins.others):
        assert mine.stride() == other.stride()
        assert twins.opt.state[mine]["square_avg"].stride() == twins.reference.state[other]["square_avg"].stride()


def test_layouts_without_waiting(gpu: Gpu):
    twins = Twins([gaps(random((3, 4))), random((4, 3)).t()])
    for seed in (1, 2, 3):
        twins.set_grads(like(twins.others, seed))
        with gpu.nothing_waited_for():
            twins.opt.step()
        twins.reference.step()
    twins.check()


def test_an_expanded_gradient(gpu: Gpu):
    twins = Twins([random((4, 3))])
    for mine, other in zip(twins.mine, twins.others):
        other.grad = torch.tensor(2.0).expand(4, 3)
        mine.grad = torch.tensor(2.0, device="cuda:0").expand(4, 3)
    twins.opt.step()
    twins.reference.step()
    twins.check()


def test_a_gradient_in_the_memory_of_a_parameter(gpu: Gpu):
    twins = Twins([random((6,)), random((6,), seed=1)], lr=0.1)
    for both in (twins.mine, twins.others):
        both[0].grad, both[1].grad = both[1].detach(), both[0].detach()
    twins.opt.step()
    twins.reference.step()
    twins.check()


def test_parameters_that_share_memory(gpu: Gpu):
    """They are updated one after the other."""
    start = random((6, 4))
    grads = [random((6, 4), seed=1), random((4, 6), seed=2)]
    optimizers = []
    for place in (on_gpu, on_cpu):
        w = place(start)
        pair = [w.requires_grad_(), w.detach().t().requires_grad_()]
        for each, grad in zip(pair, grads):
            each.grad = place(grad)
        optimizers.append(RMSprop(pair, lr=0.1))
        optimizers[-1].step()
    assert_same(*optimizers)


# --------------------------------------------------------------------------------------------------- a tensor for lr


@pytest.mark.parametrize("rule", ["default", "decoupled", "tensorflow"])
@pytest.mark.parametrize("lr_type", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_lr_on_the_device(rule: str, lr_type: torch.dtype, shape: Any, gpu: Gpu):
    rates = [torch.full(shape, rate, dtype=lr_type) for rate in (0.1, 0.03, 0.2)]
    lr = rates[0].to("cuda:0")
    start = [*(random((33,), dtype) for dtype in DTYPES), gaps(random((3, 4))), random((2, 2), torch.float64).t()]
    twins = Twins(start, **RULES[rule], lr=lr)
    for seed, rate in enumerate(rates):
        lr.copy_(rate)
        twins.reference.param_groups[0]["lr"] = rate.item()
        twins.set_grads(like(twins.others, seed))
        with gpu.nothing_waited_for():
            twins.opt.step()
        twins.reference.step()
    twins.check()


def test_lr_between_number_and_tensor(gpu: Gpu):
    twins = Twins([random((5,))], lr=0.1)
    for seed, rate in enumerate((0.1, 0.3, 0.2)):
        group = twins.opt.param_groups[0]
        group["lr"] = torch.tensor(rate, dtype=torch.float64, device="cuda:0") if rate == 0.3 else rate
        twins.reference.param_groups[0]["lr"] = rate
        twins.step([random((5,), seed=seed)])
    twins.check()


def test_lr_on_another_device_than_parameters():
    with emulated(2) as gpu:
        twins = Twins([random((5,)), random((3,), torch.float64)], device=1, lr=torch.tensor(0.5, device="cuda:0"))
        twins.set_grads(like(twins.others, 1))
        with gpu.nothing_waited_for():
            twins.opt.step()
        twins.reference.step()
        twins.check()


def test_lr_on_a_device_for_a_parameter_on_the_cpu(gpu: Gpu):
    mine = [on_gpu(random((5,))).requires_grad_(), random((5,)).requires_grad_()]
    opt = RMSprop(mine, lr=torch.tensor(0.1, device="cuda:0"))
    for each in mine:
        each.grad = torch.ones_like(each)
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="an lr on a GPU needs parameters on GPUs"):
        opt.step()
    assert snapshot(opt) == before


# -------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("capturable", [False, True])
def test_state_of_torch_from_the_cpu(capturable: bool, gpu: Gpu):
    """Its number of steps comes on the host."""
    options = {"lr": 0.1, "momentum": 0.9, "centered": True}
    theirs = [random((5, 3)).requires_grad_(), random((4,), seed=1).requires_grad_()]
    source = torch.optim.RMSprop(theirs, **options)
    for each, grad in zip(theirs, like(theirs, 1)):
        each.grad = grad
    source.step()
    twins = Twins(theirs, **options, capturable=capturable)
    for optimizer in (twins.opt, twins.reference):
        optimizer.load_state_dict(source.state_dict())
    for seed in (2, 3):
        twins.step(like(theirs, seed))
    assert [twins.opt.state[mine]["step"].item() for mine in twins.mine] == [3.0, 3.0]
    twins.check()


def test_state_goes_back_to_the_cpu(gpu: Gpu):
    twins = Twins([random((5, 3)), random((4,), torch.bfloat16)], lr=0.1, momentum=0.9)
    twins.step(like(twins.others, 1))
    copies = [mine.detach().cpu().requires_grad_() for mine in twins.mine]
    opt = RMSprop(copies, lr=0.5)
    opt.load_state_dict(twins.opt.state_dict())
    grads = like(twins.others, 2)
    for each, other, grad in zip(copies, twins.others, grads):
        each.grad = other.grad = grad
    opt.step()
    twins.reference.step()
    assert_same(opt, twins.reference)


def test_a_step_that_raises_changes_nothing(gpu: Gpu):
    """The second group is refused when all of the first is ready."""
    twins = Twins([random((5,)), random((5,), seed=1)], momentum=0.9)
    twins.step(like(twins.others, 1))
    second = on_gpu(random((3, 2))).requires_grad_()
    twins.opt.add_param_group({"params": [second]})
    second.grad = torch.ones_like(second)
    twins.opt.param_groups[1]["alpha"] = -1.0
    before = snapshot(twins.opt)
    with pytest.raises(ValueError, match="Invalid alpha value"):
        twins.opt.step()
    assert snapshot(twins.opt) == before
    assert second not in twins.opt.state
    assert len(parameters(twins.opt)) == 3
