"""Steps in CUDA graphs: replays are steps, read gradients, rate and scale where they are, and keep what they use."""

import gc
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
    coo,
    emulated,
    gaps,
    like,
    on_gpu,
    random,
    snapshot,
)

IDS = torch.tensor([[3, 3, 0, 9]])
pytestmark = pytest.mark.usefixtures("numpy_engine")


def of_all_kinds() -> list[Tensor]:
    """Dense, of each type; with gaps; a table for sparse gradients."""
    return [*(random((33,), dtype) for dtype in DTYPES), gaps(random((3, 4))), random((10, 4))]


def gradients(seed: int) -> list[Tensor]:
    *dense, table = like(of_all_kinds(), seed)
    return [*dense, coo(IDS + seed % 3 - 1, table[:4], (10, 4))]  # some with a row -1 or 10


def existing(grad: Tensor) -> Tensor:
    """Without rows that do not exist, which the CPU refuses."""
    if grad.layout is not torch.sparse_coo:
        return grad
    (ids,) = grad._indices()
    there = (ids >= 0) & (ids < len(grad))
    return coo(ids[there][None], grad._values()[there], grad.shape)


class Scene(Twins):
    """Twins with gradients that stay where they are, as replays need them."""

    def __init__(self, tensors: list[Tensor], **options: Any) -> None:
        super().__init__(tensors, capturable=True, **options)
        self.set_grads(gradients(0) if len(tensors) > 1 else like(tensors, 0))
        self.side = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()

    def refresh(self, seed: int) -> None:
        """Other gradients, in place on the GPU."""
        grads = gradients(seed) if len(self.mine) > 1 else like(self.mine, seed)
        for mine, other, grad in zip(self.mine, self.others, grads):
            if grad.layout is torch.sparse_coo:
                mine.grad._indices().copy_(grad._indices())
                mine.grad._values().copy_(grad._values())
            else:
                mine.grad.copy_(grad)
            other.grad = existing(grad)

    def warm_up(self, seed: int = 1) -> None:
        """The step that must come before, on a side stream as torch advises."""
        self.refresh(seed)
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            self.opt.step()
        torch.cuda.current_stream().wait_stream(self.side)
        self.reference.step()

    def capture(self, gpu: Gpu) -> None:
        with torch.cuda.graph(self.graph), gpu.nothing_waited_for(), gpu.no_memory_from_cupy():
            self.opt.step()

    def replay(self, seed: int) -> None:
        """With other gradients, and on the CPU a step."""
        self.refresh(seed)
        self.graph.replay()
        self.reference.step()


@pytest.mark.parametrize("rule", RULES)
def test_replays_are_steps(rule: str, gpu: Gpu):
    scene = Scene(of_all_kinds(), **{"lr": 0.1, **RULES[rule]})
    scene.warm_up()
    scene.capture(gpu)
    scene.check()
    for seed in (2, 3, 4):
        scene.replay(seed)
    scene.check()


@pytest.mark.parametrize("rule", ["default", "decoupled"])
def test_lr_changes_between_replays(rule: str, gpu: Gpu):
    lr = torch.tensor(0.5, dtype=torch.float64, device="cuda:0")
    scene = Scene(of_all_kinds(), **RULES[rule], lr=lr)
    scene.warm_up()
    scene.capture(gpu)
    for seed, rate in enumerate((0.5, 0.1, 0.3), 2):
        lr.fill_(rate)
        scene.reference.param_groups[0]["lr"] = rate
        scene.replay(seed)
    scene.check()


def test_steps_between_replays(gpu: Gpu):
    """With a rate of their own; the next replay has its own again."""
    scene = Scene(of_all_kinds(), lr=0.1, momentum=0.9)
    scene.warm_up()
    scene.capture(gpu)
    for seed in (2, 3, 4, 5):
        if seed % 2:
            scene.refresh(seed)
            for opt in (scene.opt, scene.reference):
                opt.param_groups[0]["lr"] = 0.7
                opt.step()
                opt.param_groups[0]["lr"] = 0.1
        else:
            scene.replay(seed)
    scene.check()


def test_scale_and_skip_are_read_at_each_replay(gpu: Gpu):
    scene = Scene(of_all_kinds(), lr=0.1, momentum=0.9)
    scale, found_inf = torch.ones((), device="cuda:0"), torch.zeros((), device="cuda:0")
    scene.opt.grad_scale, scene.opt.found_inf = scale, found_inf
    scene.warm_up()
    scene.capture(gpu)
    for seed, (factor, skip) in enumerate([(4.0, 0.0), (2.0, 1.0), (8.0, 0.0)], 2):
        scale.fill_(factor)
        found_inf.fill_(skip)
        scene.reference.grad_scale, scene.reference.found_inf = torch.tensor(factor), torch.tensor(skip)
        before = snapshot(scene.opt)
        scene.replay(seed)
        assert (snapshot(scene.opt) == before) == bool(skip)
        scene.check()


@pytest.mark.parametrize("seed", range(6))
def test_in_any_order_of_streams(seed: int):
    with emulated(deferred=True, seed=seed) as gpu:
        lr = torch.tensor(0.5, dtype=torch.float64, device="cuda:0")
        scene = Scene(of_all_kinds(), lr=lr, momentum=0.9)
        scene.warm_up()
        scene.capture(gpu)
        for number in (2, 3):
            scene.replay(number)
        scene.check()


# ------------------------------------------------------------------------------------------------ memory of a graph


def test_a_graph_keeps_what_it_reads(gpu: Gpu):
    """Gradients and the rate that the program lets go of, and their memory given to others."""
    scene = Scene([random((33,))], lr=0.5, momentum=0.9)
    scene.opt.param_groups[0]["lr"] = torch.tensor(0.5, device="cuda:0")
    scene.opt.grad_scale = torch.tensor(1.0, device="cuda:0")
    scene.opt.found_inf = torch.tensor(0.0, device="cuda:0")
    scene.warm_up()
    scene.capture(gpu)
    (mine,) = scene.mine
    mine.grad = scene.opt.param_groups[0]["lr"] = None
    del scene.opt.grad_scale, scene.opt.found_inf
    gc.collect()
    taken = [torch.full(shape, torch.nan, device="cuda:0") for shape in ((33,), ()) for _ in range(20)]
    scene.graph.replay()
    scene.reference.step()
    scene.check()
    assert taken


@pytest.mark.parametrize("kinds", [1, None])
def test_a_graph_outlives_the_state_it_was_captured_with(kinds: int | None, gpu: Gpu):
    """Loaded state is other memory; replays go on in that of the capture, and harm nothing."""
    scene = Scene(of_all_kinds()[:kinds], lr=0.1, momentum=0.9)
    scene.warm_up()
    scene.capture(gpu)
    saved = scene.opt.state_dict()
    copies = {key: {name: slot.clone() for name, slot in each.items()} for key, each in saved["state"].items()}
    scene.opt.load_state_dict({**saved, "state": copies})
    del saved
    scene.refresh(2)
    for opt in (scene.opt, scene.reference):
        opt.step()
    scene.check()
    state_before = snapshot(scene.opt)
    gc.collect()
    scene.graph.replay()
    assert [slots for _, slots in snapshot(scene.opt)] == [slots for _, slots in state_before]


def test_a_later_larger_gradient_leaves_the_workspace_of_a_graph_alone(gpu: Gpu):
    scene = Scene([random((10, 4))], lr=0.1)
    (mine,), (other,) = scene.mine, scene.others
    small = coo(IDS, random((4, 4), seed=1), (10, 4))
    large = coo(IDS.repeat(1, 300), random((1200, 4), seed=2), (10, 4))
    static = on_gpu(small)
    mine.grad, other.grad = static, small
    scene.opt.step()
    scene.reference.step()
    torch.cuda.synchronize()
    scene.capture(gpu)
    mine.grad, other.grad = on_gpu(large), large
    scene.opt.step()
    scene.reference.step()
    other.grad = small
    scene.graph.replay()
    scene.reference.step()
    scene.check()


# ---------------------------------------------------------------------------------------------------------- refusals


def refused(opt: RMSprop, message: str) -> None:
    before, other = snapshot(opt), torch.zeros(1, device="cuda:0")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        other.add_(1)  # torch warns of empty graphs
        with pytest.raises(RuntimeError, match=message):
            opt.step()
    assert snapshot(opt) == before


def test_a_step_that_is_not_capturable(gpu: Gpu):
    w = on_gpu(random((5,))).requires_grad_()
    w.grad = torch.ones_like(w)
    opt = RMSprop([w])
    opt.step()
    refused(opt, "capturable=True")


def test_one_group_is_not_capturable(gpu: Gpu):
    """Nothing of the group before it is done."""
    first, second = (on_gpu(random((5,))).requires_grad_() for _ in range(2))
    opt = RMSprop([{"params": [first], "capturable": True}, {"params": [second]}])
    for each in (first, second):
        each.grad = torch.ones_like(each)
    opt.step()
    refused(opt, "capturable=True")


def test_a_first_step_cannot_be_captured(gpu: Gpu):
    w = on_gpu(random((5,))).requires_grad_()
    w.grad = torch.ones_like(w)
    opt = RMSprop([w], capturable=True)
    refused(opt, "take one step with these parameters before capturing one")
    assert w not in opt.state
    opt.step()
    assert opt.state[w]["step"].item() == 1


def test_state_that_lies_elsewhere_cannot_be_captured(gpu: Gpu):
    """As it does after a load of what torch saved: `step` on the CPU."""
    w = on_gpu(random((5,))).requires_grad_()
    w.grad = torch.ones_like(w)
    opt = RMSprop([w], capturable=True)
    opt.step()
    opt.state[w]["step"] = step = torch.tensor(7.0)
    refused(opt, "take one step with these parameters before capturing one")
    assert opt.state[w]["step"] is step
    opt.step()
    assert opt.state[w]["step"].item() == 8


def test_a_parameter_on_the_cpu(gpu: Gpu):
    """Its part would run now, and never again."""
    pair = [on_gpu(random((5,))).requires_grad_(), random((5,)).requires_grad_()]
    for each in pair:
        each.grad = torch.ones_like(each)
    opt = RMSprop(pair, capturable=True)
    opt.step()
    refused(opt, "only as a whole; its part on cpu would run at once")


def test_a_parameter_on_a_device_that_does_not_record():
    with emulated(2):
        pair = [on_gpu(random((5,)), device).requires_grad_() for device in (0, 1)]
        for each in pair:
            each.grad = torch.ones_like(each)
        opt = RMSprop([{"params": [each]} for each in pair], capturable=True)
        opt.step()
        refused(opt, "only as a whole; its part on cuda:1 would run at once")
