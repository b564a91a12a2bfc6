"""CuPy is replaced where it needs the driver, by things of the same names, and put back."""

import gc
import inspect

import pytest

from tests.device_support import cupy, cupy_on_cpu, emulation, raw


def names() -> list[tuple[object, str]]:
    return [(owner, name) for owner, replaced in emulation.PATCHES for name in replaced]


def test_everything_is_put_back() -> None:
    before = [getattr(owner, name, None) for owner, name in names()]
    members = dict(cupy.ndarray.__dict__)
    allocator = cupy.cuda.get_allocator()
    with cupy_on_cpu():
        assert cupy.cuda.is_available()
    with pytest.raises(RuntimeError, match="stop"), cupy_on_cpu():
        raise RuntimeError("stop")
    assert [getattr(owner, name, None) for owner, name in names()] == before
    assert dict(cupy.ndarray.__dict__) == members
    assert cupy.cuda.get_allocator() == allocator


def test_kernels_serve_the_next_machine_too() -> None:
    with cupy_on_cpu():
        kernel = raw("store_double")
    with cupy_on_cpu():
        out = cupy.empty(1)
        kernel((1,), (1,), (out, 2.5))
        assert out.item() == 2.5
    with pytest.raises(RuntimeError, match="no emulated device"):
        kernel((1,), (1,), (None, 2.5))
    del out
    gc.collect()


def test_every_replaced_name_is_one_of_cupy() -> None:
    absent = {name for owner, name in names() if not hasattr(owner, name)}
    assert absent == {"__cupy_override_elementwise_kernel__"}  # CuPy asks for it, and has none of its own


@pytest.mark.parametrize("cls", ["Event", "Stream"])
def test_classes_have_the_parameters_of_cupy(cls: str) -> None:
    real, ours = getattr(cupy.cuda, cls), emulation.CUDA[cls]
    checked = [name for name in vars(ours) if callable(getattr(real, name, None)) and not name.startswith("_")]
    assert {"record", "synchronize"} <= set(checked)
    for name in [*checked, "__init__"]:
        parameters = inspect.signature(getattr(real, name)).parameters
        assert list(inspect.signature(getattr(ours, name)).parameters) == list(parameters), name


@pytest.mark.parametrize("cls", ["Device", "Event", "Graph", "Stream"])
def test_classes_have_no_public_names_of_their_own(cls: str) -> None:
    extra = {name for name in dir(emulation.CUDA[cls]) if not name.startswith("_")} - set(dir(getattr(cupy.cuda, cls)))
    assert not extra
