"""What cannot be saved or loaded: the wrong variables, and damaged files; nothing changes then."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpurms import RMSprop, Variable, safetensors_file, schedules
from tests.checkpoint_support import small
from tests.support import step, unchanged

pytestmark = pytest.mark.usefixtures("numpy_engine")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.safetensors"


# --- what cannot be saved -----------------------------------------------------------------------------------


def test_variables_left_out(path: Path):
    opt, variables = small()
    with pytest.raises(ValueError, match="'b' has slots in this optimizer and is not among the 1 variables given"):
        opt.save(path, variables[:1])
    assert not path.exists()


@pytest.mark.parametrize("again", [lambda a: a, lambda a: a.value, lambda a: a.value[:], lambda a: Variable(a.value)])
def test_the_same_variable_twice(again: Callable[[Variable], Any], path: Path):
    (opt, (a, b)), (other, (c, d)) = small(), small()
    opt.save(path)
    with pytest.raises(ValueError, match="variable 2 was given before"):
        opt.save(path, [a, b, again(a)])
    with unchanged(other, c, d), pytest.raises(ValueError, match="variable 2 was given before"):
        other.load(path, [c, d, again(c)])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (np.ones((2, 2)), "must be a list of variables; got variable"),
        (Variable([1.0]), "must be a list of variables; got variable 'Variable'"),
        ([[1.0, 2.0]], "expected a gpurms.Variable or a writeable array"),
        ([np.ones(2, int)], "expected float16, bfloat16, float32 or float64; got int64"),
        ([np.ones(2), None], "expected a gpurms.Variable or a writeable array"),
        (1.0, "not iterable"),
    ],
)
def test_no_variables(variables: Any, message: str, path: Path):
    for act in (RMSprop().load, RMSprop().save):
        RMSprop().save(path, [np.ones(2)])
        with pytest.raises(TypeError, match=message):
            act(path, variables)


def test_a_config_that_is_no_json(path: Path):
    class Odd(RMSprop):
        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "odd": object()}

    with pytest.raises(TypeError, match=r"odd cannot be saved as JSON: .* not JSON serializable; .*gives <object"):
        Odd().save(path)
    assert os.listdir(path.parent) == []


def test_a_schedule_that_is_no_json(path: Path):
    class Own(schedules.LearningRateSchedule):
        def __call__(self, step: Any) -> float:
            return 0.5

        def get_config(self) -> dict[str, Any]:
            return {"rates": np.ones(2)}

    message = "learning_rate cannot be saved as JSON: .*ndarray.*; get_config gives {'class_name': 'Own'"
    with pytest.raises(TypeError, match=message):
        RMSprop(Own()).save(path)
    assert os.listdir(path.parent) == []


# --- what cannot be loaded ----------------------------------------------------------------------------------


def read_only(*shape: int) -> np.ndarray:
    array = np.ones(shape)
    array.flags.writeable = False
    return array


FLOAT32 = np.float32
MISFITS: dict[str, tuple[Callable[[], list[Any]], type[Exception], str]] = {
    "too few": (lambda: [np.ones(2)], ValueError, "holds 2 variables; got 1"),
    "none": (list, ValueError, "holds 2 variables; got 0"),
    "too many": (lambda: [np.ones(n) for n in (2, 3, 4)], ValueError, "holds 2 variables; got 3"),
    "shape": (
        lambda: [np.ones(2), np.ones((2, 3), FLOAT32)],
        ValueError,
        r"variable 1 \(float32 ndarray of shape \(2, 3\)\), for variables/1 of .*: expected shape \(3, 2\); got",
    ),
    "broadcast": (lambda: [np.ones(1), np.ones((3, 2), FLOAT32)], ValueError, r"expected shape \(2,\); got \(1,\)"),
    "order": (lambda: [np.ones((3, 2), FLOAT32), np.ones(2)], TypeError, "expected float64; got float32"),
    "type": (
        lambda: [np.ones(2), Variable(np.ones((3, 2)), "w")],
        TypeError,
        "variable 'w', for variables/1 of .*checkpoint.safetensors: expected float32; got float64",
    ),
    "byte order": (lambda: [np.ones(2, ">f8"), np.ones((3, 2), FLOAT32)], TypeError, "got >f8"),
    "read-only": (lambda: [read_only(2), np.ones((3, 2), FLOAT32)], TypeError, "expected a writeable array"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_variables_that_do_not_fit(name: str, path: Path):
    make, error, message = MISFITS[name]
    small()[0].save(path)
    opt, variables = RMSprop(0.5), make()
    with unchanged(opt, *variables), pytest.raises(error, match=message):
        opt.load(path, variables)
    assert opt.get_config() == RMSprop(0.5).get_config()


def test_an_optimizer_with_other_variables(path: Path):
    small()[0].save(path)
    opt, var = RMSprop(0.5), Variable(np.ones(4), "mine")
    step(opt, var)
    _, others = small()
    for given, message in ((None, "holds 2 variables; got 1"), (others, "'mine' has slots in this optimizer")):
        with unchanged(opt, var, *others), pytest.raises(ValueError, match=message):
            opt.load(path, given)


def test_a_read_only_counter(path: Path):
    small()[0].save(path)
    opt, count = RMSprop(0.5), np.array(3)
    opt.iterations = Variable(count)
    count.flags.writeable = False
    with unchanged(opt), pytest.raises(TypeError, match="read-only"):
        opt.load(path)


def test_an_unknown_schedule(path: Path):
    file = RMSprop(0.5)
    file.save(path)
    edit(path, lambda state: state["config"].update(learning_rate={"class_name": "Own", "config": {}}))
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: .*Unknown decay: Own"):
        RMSprop().load(path)

    class Broken(schedules.LearningRateSchedule):
        @classmethod
        def from_config(cls, config: Any) -> Any:
            return 1 // 0

    opt, variables = small()
    with unchanged(opt, *variables), pytest.raises(ValueError, match=r"checkpoint\.safetensors: ") as raised:
        opt.load(path, custom_objects={"Own": Broken})
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


# --- damaged files ------------------------------------------------------------------------------------------

Header = dict[str, Any]


def rewrite(path: Path, change: Callable[[Header], Any], data: Callable[[bytes], bytes] = bytes) -> None:
    """Change the header of a file, and its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data(raw[8 + length :]))


def edit(path: Path, change: Callable[[Header], Any]) -> None:
    """Change the JSON in the metadata."""

    def on_header(header: Header) -> None:
        metadata = header["__metadata__"]
        state = json.loads(metadata["state"])
        change(state)
        metadata["state"] = json.dumps(state)

    rewrite(path, on_header)


def assert_refused(path: Path, message: str, error: type[Exception] = ValueError) -> None:
    """By an optimizer in use and by a new one."""
    opt, variables = small(centered=False)
    config = opt.get_config()
    with unchanged(opt, *variables), pytest.raises(error, match=message):
        opt.load(path)
    assert opt.get_config() == config
    with pytest.raises(error, match=message):
        RMSprop().load(path)


def test_truncated_anywhere(path: Path):
    small()[0].save(path)
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(ValueError, match="truncated"):
            RMSprop().load(path)


def test_truncated_or_longer_changes_nothing(path: Path):
    small()[0].save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    assert_refused(path, "truncated one: data expected at offset")
    path.write_bytes(raw + b"\0")
    assert_refused(path, "damaged or truncated one: data expected at offset")


TEXTS: dict[str, bytes] = {
    "no JSON": b"hello",
    "no object": b"[]",
    "a number": b"7",
    "null": b"null",
    "no UTF-8": b'{"\xff": 1}',
    "UTF-16": '{"__metadata__": {}}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "long number": b'{"a": ' + b"1" * 5000 + b"}",
    "no description": b'{"a": 1}',
    "incomplete": b'{"a": {"dtype": "F32", "shape": [0]}}',
    "further fields": b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0], "x": 1}}',
    "one offset": b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0]}}',
    "text as offset": b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": ["0", 0]}}',
    "fraction": b'{"a": {"dtype": "F32", "shape": [0.0], "data_offsets": [0, 0]}}',
    "boolean": b'{"a": {"dtype": "F32", "shape": [false], "data_offsets": [0, 0]}}',
    "negative": b'{"a": {"dtype": "F32", "shape": [-1, 0], "data_offsets": [0, 0]}}',
    "type": b'{"a": {"dtype": "C64", "shape": [0], "data_offsets": [0, 0]}}',
    "list as type": b'{"a": {"dtype": [], "shape": [0], "data_offsets": [0, 0]}}',
    "size": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 0]}}',
    "huge": b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}',
    "empty and huge": b'{"a": {"dtype": "F32", "shape": [0, 4611686018427387904, 4], "data_offsets": [0, 0]}}',
    "2**63": b'{"a": {"dtype": "F32", "shape": [0, 9223372036854775808], "data_offsets": [0, 0]}}',
    "dimensions": b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 0]}}' % b",".join([b"1"] * 65),
    "twice": b'{"__metadata__": {}, "__metadata__": {}}',
    "metadata": b'{"__metadata__": {"format": 1}}',
    "metadata list": b'{"__metadata__": []}',
}


@pytest.mark.parametrize("name", TEXTS)
def test_headers_that_are_none(name: str, path: Path):
    path.write_bytes(len(TEXTS[name]).to_bytes(8, "little") + TEXTS[name])
    assert_refused(path, "checkpoint.safetensors: no safetensors file, or a damaged or truncated one: .")


HOSTILE: dict[str, bytes] = {  # no stalling, and no messages as long as the file
    "dimensions": b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 0]}}' % b",".join([b"9" * 4000] * 3000),
    "digits": b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 0]}}' % b",".join([b"9" * 4000] * 64),
    "offsets": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, %s]}}' % (b"9" * 4000),
    "type": b'{"a": {"dtype": "%s", "shape": [1], "data_offsets": [0, 4]}}' % (b"F" * 100_000),
    "field": b'{"a": {"%s": 1}}' % (b"F" * 100_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str, path: Path):
    path.write_bytes(len(HOSTILE[name]).to_bytes(8, "little") + HOSTILE[name])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: no safetensors file, or a damaged") as raised:
        RMSprop().load(path)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("length", [1 << 63, 101, 100_000_001])
def test_lengths_of_headers(length: int, path: Path):
    path.write_bytes(length.to_bytes(8, "little"))
    os.truncate(path, 108 if length < 1000 else 200_000_000)
    assert_refused(path, f"of which a header would be {length}")


def test_offsets(path: Path):
    """Tensors that overlap, leave holes, or lie outside of the data."""
    small()[0].save(path)
    raw = path.read_bytes()
    for name, shift in (("variables/0", -16), ("variables/0", 8), ("slots/1/mg", 24), ("slots/1/mg", 1 << 62)):
        path.write_bytes(raw)

        def move(header: Header, name: str = name, shift: int = shift) -> None:
            header[name]["data_offsets"] = [offset + shift for offset in header[name]["data_offsets"]]

        rewrite(path, move)
        assert_refused(path, "data expected at offset|offsets")


@pytest.mark.parametrize("text", [b"{}", b'{"a": {"dtype": "F16", "shape": [2], "data_offsets": [4, 8]}}'])
def test_data_before_the_first_tensor(text: bytes, path: Path):
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert_refused(path, "data expected at offset 0 of 8, found at")


def test_a_file_of_another_program(path: Path):
    text = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert_refused(path, "no checkpoint of gpurms: expected 'gpurms' as format in its metadata")


@pytest.mark.parametrize("version", ["2", "0", "1.0", ""])
def test_another_version(version: str, path: Path):
    small()[0].save(path)
    rewrite(path, lambda header: header["__metadata__"].update(version=version))
    assert_refused(path, f"checkpoint of format version {version}; this gpurms reads version 1")


def swap(header: Header, *names: str) -> None:
    header[names[0]], header[names[1]] = header[names[1]], header[names[0]]


HEADERS: dict[str, Callable[[Header], Any]] = {
    "no state": lambda header: header["__metadata__"].pop("state"),
    "a tensor less": lambda header: header.update({"other": header.pop("slots/0/rms")}),
    "a variable less": lambda header: header.update({"variables/2": header.pop("variables/1")}),
    "slots of other shapes": lambda header: swap(header, "slots/0/rms", "slots/1/rms"),
    "a vector as counter": lambda header: header["iterations"].update(shape=[1]),
    "a float as counter": lambda header: header["iterations"].update(dtype="F64"),
    "integers as slot": lambda header: header["slots/0/rms"].update(dtype="I64"),
}
STATES: dict[str, Callable[[Header], Any]] = {
    "no config": lambda state: state.pop("config"),
    "config as list": lambda state: state.update(config=[]),
    "further parts": lambda state: state.update(more=1),
    "a variable less": lambda state: state["variables"].pop(),
    "a variable more": lambda state: state["variables"].append(state["variables"][0]),
    "a variable without a name": lambda state: state["variables"][0].pop("name"),
    "a number as name": lambda state: state["variables"][0].update(name=1),
    "variables as numbers": lambda state: state.update(variables=[1, 2]),
    "variables as a number": lambda state: state.update(variables=2),
    "a slot less": lambda state: state["slots"].pop(),
    "a slot twice": lambda state: state["slots"].append(state["slots"][0]),
    "a slot twice for another": lambda state: state["slots"].__setitem__(1, state["slots"][0]),
    "a slot of no variable": lambda state: state["slots"].__setitem__(0, [-1, "rms"]),
    "slots as numbers": lambda state: state.update(slots=[1, 2, 3, 4, 5, 6]),
    "callables of no setting": lambda state: state.update(callables=["nothing"]),
    "callables as lists": lambda state: state.update(callables=[["rho"]]),
}


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_headers(name: str, path: Path):
    small()[0].save(path)
    rewrite(path, HEADERS[name])
    assert_refused(path, "checkpoint.safetensors: damaged checkpoint: .")


@pytest.mark.parametrize("name", STATES)
def test_damaged_states(name: str, path: Path):
    small()[0].save(path)
    edit(path, STATES[name])
    assert_refused(path, "checkpoint.safetensors: damaged checkpoint: .")


def test_bad_settings(path: Path):
    small()[0].save(path)
    edit(path, lambda state: state["config"].update(rho=2.0))
    assert_refused(path, r"checkpoint.safetensors: settings that cannot be restored: rho must be in \[0, 1\]")
    edit(path, lambda state: state["config"].update(rho=0.5, speed=1))
    assert_refused(path, "checkpoint.safetensors: .*Unexpected keyword argument.*speed")
    with pytest.raises(ValueError, match="speed") as raised:
        RMSprop().load(path)
    assert isinstance(raised.value.__cause__, TypeError)


def test_flipped_bits(path: Path):
    """Whatever becomes of a header, it is loaded or refused, and nothing between the two."""
    small()[0].save(path)
    raw = path.read_bytes()
    rng = np.random.default_rng(0)
    n_refused = 0
    for at in rng.integers(0, 8 + int.from_bytes(raw[:8], "little"), 300):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        opt, variables = small(centered=False)
        before = [x.numpy().tobytes() for x in (*variables, *opt.weights)], opt.get_config()
        try:
            opt.load(path)
        except (TypeError, ValueError):
            n_refused += 1
            assert ([x.numpy().tobytes() for x in (*variables, *opt.weights)], opt.get_config()) == before
    assert n_refused > 200


def test_the_file_becomes_shorter_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch):
    RMSprop().save(path, [np.ones(10_000)])
    original = safetensors_file.read_header

    def read_header(file: Any) -> Any:
        found = original(file)
        os.truncate(path, path.stat().st_size - 1)
        return found

    monkeypatch.setattr("gpurms.checkpoint.read_header", read_header)
    with pytest.raises(OSError, match="has become shorter"):
        RMSprop().load(path)
