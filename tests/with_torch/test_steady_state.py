"""What stays from step to step: nothing is made anew for gradients like those before, and nothing old is kept alive."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch

from gpurms.kernels import pool
from gpurms.torch import RMSprop, members


def parameter(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    return torch.randn(shape).to(memory_format=layout).requires_grad_()


@contextmanager
def nothing_made() -> Iterator[None]:
    """Neither updates nor tables nor gradients laid out anew."""
    with (
        mock.patch.object(members.Members, "_make_direct", side_effect=AssertionError("made a table")),
        mock.patch.object(members.Members, "_filled", side_effect=AssertionError("made an update")),
    ):
        yield


@contextmanager
def nothing_copied() -> Iterator[None]:
    with nothing_made(), mock.patch.object(members.Members, "_normal", side_effect=AssertionError("looked closer")):
        yield


def random_grads(some: list[torch.Tensor]) -> None:
    for each in some:
        each.grad = torch.randn_like(each)


def test_usual_steps_make_nothing():
    some = [parameter(3, 2), parameter(), parameter(0, 3), parameter(2, 3, 4, 5, layout=torch.channels_last)]
    opt = RMSprop(some, momentum=0.5)
    random_grads(some)
    opt.step()
    for _ in range(3):
        random_grads(some)
        with nothing_copied():
            opt.step()


@pytest.mark.parametrize(
    ("shape", "strides"), [((16, 8, 1, 1), (8, 1, 8, 8)), ((1, 8), (1, 1)), ((3, 1, 4), (4, 7, 1))]
)
def test_strides_of_length_one_say_nothing(shape: tuple[int, ...], strides: tuple[int, ...]):
    """Convolutions of 1x1 get such gradients."""
    w, twin = parameter(*shape), parameter(5)
    opt = RMSprop([w, twin])

    def grads() -> None:
        w.grad = torch.randn(w.numel()).as_strided(shape, strides)
        twin.grad = torch.randn(5)

    grads()
    opt.step()
    before, square_avg = w.detach().clone(), opt.state[w]["square_avg"].clone()
    grads()
    with nothing_copied():
        opt.step()
    assert torch.allclose(opt.state[w]["square_avg"], 0.99 * square_avg + 0.01 * w.grad**2)
    assert not torch.equal(before, w)


def test_one_gradient_laid_out_otherwise_is_copied_alone():
    some = [parameter(3, 4) for _ in range(5)]
    plain = [each.detach().clone().requires_grad_() for each in some]
    opt, reference = RMSprop(some), RMSprop(plain)
    for nth in range(3):
        for each, twin in zip(some, plain):
            each.grad = torch.randn(3, 4)
            twin.grad = each.grad.clone()
        some[2].grad = some[2].grad.t().contiguous().t()
        with mock.patch.object(
            members.Members, "_normal", autospec=True, side_effect=members.Members._normal
        ) as looked:
            opt.step()
        reference.step()
        if nth:
            assert [call.args[1] for call in looked.call_args_list] == [2]
    assert all(map(torch.equal, some, plain))


def test_turns_of_sparse_and_dense_gradients_make_nothing():
    w, table = parameter(3), parameter(4, 2)
    opt = RMSprop([w, table])

    def step(sparse: bool) -> None:
        random_grads([w, table])
        if sparse:
            table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2), check_invariants=False)
        opt.step()

    for sparse in (True, False):
        step(sparse)
    with mock.patch.object(members.Members, "_make_direct", side_effect=AssertionError("made a table")):
        for sparse in (True, False, True, False):
            step(sparse)


def test_several_sets_of_parameters_are_remembered():
    body, head = [parameter(3), parameter(2)], [parameter(4)]
    opt = RMSprop(body + head)
    turns = [body, head, body + head]
    for some in turns:
        opt.zero_grad()
        random_grads(some)
        opt.step()
    with nothing_copied(), mock.patch.object(members.Members, "__init__", side_effect=AssertionError("made")):
        for some in turns * 2:
            opt.zero_grad()
            random_grads(some)
            opt.step()


def test_momentum_that_comes_and_goes():
    w = parameter(3)
    opt = RMSprop([w])
    for momentum in (0, 0.9):
        opt.param_groups[0]["momentum"] = momentum
        random_grads([w])
        opt.step()
    with nothing_copied():
        for momentum in (0, 0.9, 0, 0.9):
            opt.param_groups[0]["momentum"] = momentum
            random_grads([w])
            opt.step()


def test_replaced_state_is_let_go():
    """Offloading, for one, replaces it between phases."""
    body, head = parameter(3), parameter(4)
    opt = RMSprop([body, head])
    for some in ([body, head], [head]):
        opt.zero_grad()
        random_grads(some)
        opt.step()
    old = [weakref.ref(opt.state[each]["square_avg"].untyped_storage()) for each in (body, head)]
    for each in (body, head):
        opt.state[each]["square_avg"] = opt.state[each]["square_avg"].clone()
    for _ in range(2):
        random_grads([head])
        opt.step()
    gc.collect()
    assert [each() for each in old] == [None, None]


def test_removed_group_is_let_go():
    w, gone = parameter(3), parameter(2)
    opt = RMSprop([{"params": [w]}, {"params": [gone]}])
    random_grads([w, gone])
    opt.step()
    opt.param_groups.pop()
    del opt.state[gone]
    alive = weakref.ref(gone)
    del gone
    opt.step()
    gc.collect()
    assert alive() is None


def test_storage_can_be_resized_after_a_step():
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.ones(4, 3, dtype=dtype, requires_grad=True)
        w.grad = torch.ones_like(w)
        opt = RMSprop([w])
        opt.step()
        for tensor in (w, w.grad, opt.state[w]["square_avg"]):
            storage = tensor.untyped_storage()
            storage.resize_(2 * storage.nbytes())
        opt.step()
        assert opt.state[w]["step"].item() == 2


def test_steps_collect_no_garbage():
    some = [parameter(2) for _ in range(3000)]
    opt = RMSprop(some)
    random_grads(some)
    opt.step()
    gc.collect()
    before = gc.get_stats()[2]["collections"]
    for _ in range(5):
        opt.step()
    assert gc.get_stats()[2]["collections"] == before


class Wrapped(torch.Tensor):
    """A tensor whose memory is another's."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapped":
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, size, stride):
        return Wrapped(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        plain = [each.inner if isinstance(each, Wrapped) else each for each in args]
        return Wrapped(function(*plain, **(kwargs or {})))


@pytest.mark.parametrize("known", [False, True])
def test_gradient_without_memory_of_its_own(known: bool):
    w = parameter(4)
    opt = RMSprop([w])
    if known:
        w.grad = torch.ones(4)
        opt.step()
    before = w.detach().clone()
    w.grad = Wrapped(torch.ones(4))
    with pytest.raises(RuntimeError, match="a Wrapped has no memory of its own"):
        opt.step()
    assert torch.equal(w, before)


def test_parameter_without_memory_of_its_own():
    with pytest.raises(RuntimeError, match="memory of its own; got a Wrapped, which wraps others"):
        RMSprop([Wrapped(torch.ones(4))])


def test_state_made_in_inference_mode():
    w = parameter(3)
    w.grad = torch.ones(3)
    opt, reference = RMSprop([w]), RMSprop([twin := w.detach().clone().requires_grad_()])
    twin.grad = torch.ones(3)
    with torch.inference_mode():
        opt.step()
    opt.step()
    reference.step()
    reference.step()
    assert torch.equal(w, twin)


@pytest.mark.parametrize("default", [{}, {"nesterov": True}])
def test_own_options_of_groups_survive_what_torch_has_saved(default: dict[str, bool]):
    some = [parameter(2), parameter(3)]
    theirs = torch.optim.RMSprop([{"params": [each]} for each in some])
    opt = RMSprop([{"params": [some[0]], "nesterov": False}, {"params": [some[1]], "eps_in_sqrt": True}], **default)
    before = [dict(group) for group in opt.param_groups]
    opt.load_state_dict(theirs.state_dict())
    for group, old in zip(opt.param_groups, before):
        assert {key: group.get(key) for key in ("nesterov", "eps_in_sqrt")} == {
            key: old.get(key) for key in ("nesterov", "eps_in_sqrt")
        }


def test_threads_are_those_that_launchers_allow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = pool.n_threads()
    for asked, expected in (("1", 1), ("100000", cores), ("", cores), ("0", cores), ("4,2", cores)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert pool.n_threads() == expected


def test_numbers_are_the_same_at_any_address():
    """Two parameters in the table, one of them twice as long as a chunk."""
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(n).astype(np.float32) for n in (1_100_000, 7)]
    some = [torch.from_numpy(value.copy()).requires_grad_() for value in values]
    parts = [torch.from_numpy(value.copy()).requires_grad_() for value in np.split(values[0], [524_288, 1_000_001])]
    for each in some:
        each.grad = torch.sin(each.detach())
    for each in parts:
        each.grad = torch.sin(each.detach())
    for group in (some, parts):
        opt = RMSprop(group, momentum=0.9)
        for _ in range(3):
            opt.step()
    assert torch.equal(some[0], torch.cat(parts))
