"""Checkpoints and the safetensors package: each reads what the other writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from gpurms import RMSprop, Variable
from tests.checkpoint_support import Run, assert_same_runs, assert_same_state, like, small
from tests.engines import Engine
from tests.support import BFLOAT16, DTYPES, assert_same_bits

pytestmark = pytest.mark.usefixtures("numpy_engine")
HOST = Engine("numpy", np)
OPTIONS = {"momentum": 0.5, "centered": True}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.safetensors"


def test_the_package_reads_checkpoints(path: Path):
    run = Run(HOST, RMSprop(0.1, **OPTIONS)).steps(0, 3)
    run.opt.save(path, run.variables)
    tensors = safetensors.numpy.load_file(path)
    assert_same_bits(tensors.pop("iterations"), np.array(3))
    for i, variable in enumerate(run.variables):
        assert_same_bits(tensors.pop(f"variables/{i}"), variable)
        for name in run.opt.get_slot_names():
            assert_same_bits(tensors.pop(f"slots/{i}/{name}"), run.opt.get_slot(variable, name))
    assert tensors == {}


def test_the_package_reads_the_metadata(path: Path):
    small()[0].save(path)
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "version", "state"}
    assert (metadata["format"], metadata["version"]) == ("gpurms", "1")


def test_nothing_but_settings(path: Path):
    RMSprop().save(path)
    assert safetensors.numpy.load_file(path) == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(dtype: np.dtype, path: Path):
    values = np.array([1.5, -0.0, np.nan, np.inf, 2**-14], dtype)
    RMSprop().save(path, [values])
    assert_same_bits(safetensors.numpy.load_file(path)["variables/0"], values)


def test_every_item_is_aligned(path: Path):
    """Odd numbers of narrow items do not push wide ones off their addresses."""
    variables = [np.ones(n, dtype) for n, dtype in ((3, np.float16), (1, np.float64), (5, BFLOAT16), (7, np.float32))]
    opt = RMSprop()
    opt.apply_gradients([(v, v) for v in variables])
    opt.save(path)
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    del header["__metadata__"]
    for name, array in safetensors.numpy.load_file(path).items():
        assert (start + header[name]["data_offsets"][0]) % array.itemsize == 0


def test_checkpoints_rewritten_by_the_package(path: Path):
    """With its order of tensors and its layout of the header."""
    run = Run(HOST, RMSprop(0.1, **OPTIONS)).steps(0, 3)
    run.opt.save(path, run.variables)
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    ours = path.read_bytes()
    safetensors.numpy.save_file(dict(sorted(tensors.items(), reverse=True)), path, metadata)
    assert path.read_bytes() != ours
    other = Run(HOST, RMSprop(), seed=1)
    other.opt.load(path, other.variables)
    assert_same_runs(run, other)


@pytest.mark.parametrize("padding", [b"", b" ", b" " * 1000])
def test_paddings_of_the_header(padding: bytes, path: Path):
    opt, variables = small()
    opt.save(path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].rstrip() + padding
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    safetensors.numpy.load_file(path)
    other, others = RMSprop(), like(variables)
    other.load(path, others)
    assert_same_state(opt, variables, other, others)


def test_unusual_names(path: Path):
    opt, var = RMSprop(name='"\\\u20ac\U0001f600'), Variable([1.0], "a/\n\u00fc")
    opt.add_slot(var, 'own "slot"/\u20ac\U0001f600')
    opt.save(path)
    assert safetensors.numpy.load_file(path).keys() == {"variables/0", 'slots/0/own "slot"/\u20ac\U0001f600'}
    other = RMSprop()
    [new] = other.load(path)
    assert (new.name, other.name, other.get_slot_names()) == (var.name, opt.name, opt.get_slot_names())


def test_tensors_of_the_package_are_no_checkpoint(path: Path):
    safetensors.numpy.save_file({"w": np.ones(3)}, path)
    with pytest.raises(ValueError, match="no checkpoint of gpurms"):
        RMSprop().load(path)
    safetensors.numpy.save_file({"w": np.ones(3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="no checkpoint of gpurms"):
        RMSprop().load(path)
