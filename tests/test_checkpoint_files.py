"""Checkpoint files are replaced whole or not at all, and streamed."""

import errno
import fcntl
import os
import re
import resource
import signal
import stat
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpurms import RMSprop, atomic_file, safetensors_file
from gpurms.atomic_file import replacing
from tests.checkpoint_support import assert_same_state, like, small
from tests.support import python, step, unchanged

pytestmark = pytest.mark.usefixtures("numpy_engine")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.safetensors"


# --- writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path, os.fsencode])
def test_kinds_of_paths(kind: Callable[[Path], Any], path: Path):
    opt, variables = small()
    opt.save(kind(path))
    other, others = RMSprop(), like(variables)
    other.load(kind(path), others)
    assert_same_state(opt, variables, other, others)
    assert os.listdir(path.parent) == [path.name]


def test_relative_path(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(path.parent)
    small()[0].save(path.name)
    assert os.listdir(path.parent) == [path.name]


def test_number_as_path():
    for act in (RMSprop().save, RMSprop().load):
        with pytest.raises(TypeError):
            act(1)  # an open file to `open`


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_permissions_of_a_new_file(mask: int, path: Path):
    with umask(mask):
        RMSprop().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_permissions_of_an_old_file(path: Path):
    RMSprop().save(path)
    path.chmod(0o640)
    with umask(0o022):
        RMSprop().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_goes_on_pointing_to_the_file(path: Path, tmp_path: Path):
    (tmp_path / "runs").mkdir()
    link, file = path, tmp_path / "runs" / "file"
    link.symlink_to(file)
    RMSprop(0.25).save(link)
    RMSprop(0.5).save(link)
    assert link.is_symlink()
    other = RMSprop()
    other.load(file)
    assert other.learning_rate == 0.5


def test_what_a_file_cannot_replace(path: Path, tmp_path: Path):
    with pytest.raises(IsADirectoryError):
        RMSprop().save(tmp_path)
    with pytest.raises(IsADirectoryError):
        RMSprop().load(tmp_path)
    os.mkfifo(path)
    with pytest.raises(OSError, match="expected a regular file"):
        RMSprop().save(path)
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_no_such_folder(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        RMSprop().save(tmp_path / "none" / "file")
    with pytest.raises(FileNotFoundError):
        RMSprop().load(tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_synced_before_and_after_the_renaming(path: Path, monkeypatch: pytest.MonkeyPatch):
    """First the data, then the name."""
    done = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        info = os.fstat(descriptor)
        done.append(("folder" if stat.S_ISDIR(info.st_mode) else info.st_size, info.st_ino))
        fsync(descriptor)

    def spy_replace(source: str, target: str) -> None:
        assert (os.path.dirname(source), target) == (str(path.parent), str(path))
        done.append(("renamed", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    small()[0].save(path)
    info = path.stat()
    assert done == [(info.st_size, info.st_ino), ("renamed", info.st_ino), ("folder", path.parent.stat().st_ino)]


def test_folders_that_cannot_be_synced(path: Path, monkeypatch: pytest.MonkeyPatch):
    fsync = os.fsync

    def no_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no folders")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    RMSprop(0.5).save(path)
    RMSprop(0.5).load(path)


def test_a_folder_that_cannot_be_read(path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file is in its place then."""
    os_open = os.open

    def no_folders(name: Any, *arguments: Any) -> int:
        if os.path.isdir(name):
            raise PermissionError(errno.EACCES, "no folders", name)
        return os_open(name, *arguments)

    def no_list(name: Any) -> None:
        raise PermissionError(errno.EACCES, "no folders", name)

    monkeypatch.setattr(os, "open", no_folders)
    monkeypatch.setattr(os, "listdir", no_list)
    RMSprop(0.5).save(path)
    RMSprop(0.5).load(path)


@contextmanager
def disk_full() -> Iterator[None]:
    """Files end at 1000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("n_numbers", [10, 10_000], ids=["at the end", "in the data"])
def test_disk_full(n_numbers: int, exists: bool, path: Path):
    (opt, variables), old = small(), b"an older file" * exists
    if exists:
        path.write_bytes(old)
    more = [*variables, np.zeros(n_numbers)]
    with unchanged(opt, *more), disk_full(), pytest.raises(OSError) as raised:
        opt.save(path, more)
    assert raised.value.errno == errno.EFBIG
    assert os.listdir(path.parent) == [path.name] * exists
    assert not exists or path.read_bytes() == old


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_whatever_fails(name: str, error: BaseException, path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: Any) -> None:
        raise error

    path.write_bytes(b"an older file")
    opt, variables = small()
    monkeypatch.setattr(os, name, fail)
    with unchanged(opt, *variables), pytest.raises(type(error)):
        opt.save(path)
    assert path.read_bytes() == b"an older file"
    assert os.listdir(path.parent) == [path.name]


def test_killed(path: Path):
    """A killed process leaves its temporary file, and the old one whole."""
    program = (
        "import os, signal, sys, numpy as np, gpurms\n"
        "opt, var = gpurms.RMSprop(0.5), np.ones(5)\n"
        "opt.save(sys.argv[1], [var])\n"
        "os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n"
        "opt.save(sys.argv[1], [var * 2])\n"
    )
    for _ in range(2):
        assert python("-c", program, str(path)).returncode == -signal.SIGKILL
        left, file = sorted(os.listdir(path.parent))
        assert re.fullmatch(rf"\.{path.name}\.[0-9a-f]{{16}}\.tmp", left)
        assert file == path.name
        [var] = RMSprop().load(path)
        assert var.tolist() == [1] * 5
    RMSprop().save(path.with_name("another"))
    assert sorted(os.listdir(path.parent)) == [left, "another", file]
    RMSprop().save(path)
    assert sorted(os.listdir(path.parent)) == ["another", file]


def test_saves_at_the_same_time(path: Path):
    """The one that ends last stays; neither takes the other's file for that of a killed process."""
    with replacing(str(path)) as first:
        first.write(b"first")
        with replacing(str(path)) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert os.listdir(path.parent) == [path.name]


def test_a_temporary_file_that_is_taken_before_it_is_locked(path: Path, monkeypatch: pytest.MonkeyPatch):
    flock, taken = fcntl.flock, []

    def late(file: Any, how: int) -> None:
        if not taken:
            taken.append(file.name)
            os.remove(file.name)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    RMSprop(0.5).save(path)
    assert len(taken) == 1
    assert os.listdir(path.parent) == [path.name]


def test_without_locks(path: Path, monkeypatch: pytest.MonkeyPatch):
    """As some file systems of networks are: then nothing is removed that may be in use."""

    def none(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    left = path.with_name(f".{path.name}.{'0' * 16}.tmp")
    left.touch()
    RMSprop().save(path)
    assert sorted(os.listdir(path.parent)) == [left.name, path.name]
    monkeypatch.setattr(atomic_file, "fcntl", None)
    RMSprop(0.5).save(path)
    RMSprop().load(path)
    assert sorted(os.listdir(path.parent)) == [left.name, path.name]


def test_only_temporary_files_are_removed(path: Path):
    keep = [f".{path.name}.tmp", f".{path.name}.{'g' * 16}.tmp", f"{path.name}.{'0' * 16}.tmp"]
    for name in keep:
        path.with_name(name).touch()
    folder, link = (path.with_name(f".{path.name}.{n * 16}.tmp") for n in "01")
    folder.mkdir()
    link.symlink_to(path.with_name(keep[0]))
    RMSprop().save(path)
    assert sorted(os.listdir(path.parent)) == sorted([*keep, folder.name, link.name, path.name])


@pytest.mark.parametrize("name", ["n" * 255, "\N{SNOWMAN}" * 85, "a [b]*.st"])
def test_names(name: str, tmp_path: Path):
    for _ in range(2):
        RMSprop().save(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_readers_of_the_old_file_keep_it(path: Path):
    opt, variables = small()
    opt.save(path)
    old = path.read_bytes()
    with open(path, "rb") as reader:
        step(opt, *variables)
        opt.save(path)
        assert reader.read() == old
    assert path.read_bytes() != old


def test_same_state_same_file(path: Path):
    opt, variables = small()
    opt.save(path)
    first = path.read_bytes()
    other, others = RMSprop(), like(variables)
    other.load(path, others)
    other.save(path)
    assert path.read_bytes() == first


def test_too_many_variables_for_the_format(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(safetensors_file, "MAX_HEADER", 100)
    with pytest.raises(ValueError, match="safetensors allows 100"):
        small()[0].save(path)
    assert os.listdir(path.parent) == []


# --- streaming ----------------------------------------------------------------------------------------------

TABLE = 64 << 20  # bytes


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_table_is_not_copied(order: str, path: Path):
    opt, table = RMSprop(), np.zeros((TABLE // 256, 64), np.float32, order)
    opt.add_slot(table, "rms")
    tracemalloc.start()
    try:
        opt.save(path)
        opt.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 2 * TABLE
    assert peak < TABLE / 4


def test_a_memory_map_is_not_copied(path: Path, tmp_path: Path):
    """With address space for less than half a table beyond what is there already."""
    program = f"""
import resource, sys, numpy as np, gpurms, gpurms.checkpoint
table = np.memmap(sys.argv[1], np.float32, "w+", shape=({TABLE // 256}, 64))
table[::1000] = 3
opt = gpurms.RMSprop()
opt.add_slot(table, "rms")
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + {TABLE // 2},) * 2)
opt.save(sys.argv[2])
table[::1000] = 0
opt.load(sys.argv[2])
assert (table[::1000] == 3).all() and not table[1].any()
try:
    table.copy()
except MemoryError:
    print("a copy would have failed")
"""
    done = python("-c", program, str(tmp_path / "table"), str(path), GPURMS_ENGINE="numpy", GPURMS_BACKEND="numpy")
    assert (done.stdout, done.stderr) == ("a copy would have failed\n", "")


def test_slots_occupy_memory_only_where_rows_were_touched(path: Path, tmp_path: Path):
    """Also after a load, into a new optimizer or one that has the slots."""
    program = f"""
import resource, sys, numpy as np, gpurms, gpurms.checkpoint
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
table = np.zeros(({TABLE // 256}, 64), np.float32)
ids = np.array([0, 5, 70_000, {TABLE // 256 - 1}])
opt = gpurms.RMSprop(momentum=0.9)
opt.apply_gradients([(gpurms.IndexedSlices(np.ones((4, 64), np.float32), ids), table)])
opt.save(sys.argv[1])
table += 1
for other in (gpurms.RMSprop(), gpurms.RMSprop(momentum=0.9)):
    if other.momentum:
        empty = gpurms.IndexedSlices(np.ones((1, 64), np.float32), np.array([9]))
        other.apply_gradients([(empty, table)])
    before = resident()
    other.load(sys.argv[1], [table])
    print(resident() - before < {TABLE // 4})
    for name in ("rms", "momentum"):
        print(np.array_equal(opt.get_slot(table, name).value, other.get_slot(table, name).value))
"""
    done = python("-c", program, str(path), GPURMS_ENGINE="numpy", GPURMS_BACKEND="numpy")
    assert (done.stdout, done.stderr) == ("True\n" * 6, "")
