"""The command ``gpurms demo``, as a user meets it."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import gpurms
from gpurms.__main__ import main
from gpurms.demo import command, corpus
from gpurms.demo.train import Settings
from tests.engines import Engine
from tests.planted import planted_text
from tests.support import python

QUICK = ["--dim", "8", "--epochs", "1", "--subsample", "0", "--batch", "256"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "planted.txt"
    path.write_text(planted_text())
    return path


def only_line(text: str) -> str:
    """The text without the newline at its end; there must be no other."""
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    return text[:-1]


# ----------------------------------------------------------------------------------------------------- parser


OPTIONS = {
    "--text": "Python's own documentation",
    "--out": "gpurms-demo",
    "--words": "chosen for the text",
    **{f"--{name.replace('_', '-')}": str(value) for name, value in vars(Settings()).items()},
}


def test_help_of_the_demo_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    about, options = text.split("\noptions:\n")
    entries = re.split(r"\n  (?=-)", "\n" + options)
    described = {re.split("[ ,]", entry)[0]: " ".join(entry.split()) for entry in entries if entry.strip()}
    assert described.keys() == {"-h"} | OPTIONS.keys()
    for option, default in OPTIONS.items():
        assert f"default: {default})" in described[option]
    for fact in ("embeddings.npz", "demo.png"):
        assert fact in about
    for fact in ("Ctrl-C", "Exit status", "130"):
        assert fact in options


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["--version"]])
def test_help_and_version(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    if arguments == ["--version"]:
        assert out == f"gpurms {gpurms.__version__}\n"
    else:
        assert "usage: gpurms" in out
        assert "engine would run" in out


def test_the_console_script_is_main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"gpurms": f"{main.__module__}:{main.__qualname__}"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "gpurms: error: the following arguments are required: COMMAND"),
        (["fly"], "gpurms: error: argument COMMAND: invalid choice: 'fly' (choose from"),
        (["info", "now"], "gpurms: error: unrecognized arguments: now"),
        (["demo", "--nonsense", "1"], "gpurms: error: unrecognized arguments: --nonsense 1"),
        (["demo", "two\nlines"], "gpurms: error: unrecognized arguments: two lines"),
        (["demo", "--ep", "3"], "gpurms: error: unrecognized arguments: --ep 3"),
        (["demo", "--dim"], "gpurms demo: error: argument --dim: expected one argument"),
        (["demo", "--dim", "1"], "gpurms demo: error: argument --dim: expected an integer from 2 to 4,096; got '1'"),
        (["demo", "--dim", "4097"], "argument --dim: expected an integer from 2 to 4,096; got '4097'"),
        (["demo", "--dim", "8.5"], "argument --dim: expected an integer from 2 to 4,096; got '8.5'"),
        (["demo", "--dim", "x\ny"], r"argument --dim: expected an integer from 2 to 4,096; got 'x\ny'"),
        (["demo", "--window", "0"], "argument --window: expected an integer from 1 to 100; got '0'"),
        (["demo", "--negatives", "-1"], "argument --negatives: expected an integer from 1 to 1,000; got '-1'"),
        (["demo", "--epochs", ""], "argument --epochs: expected an integer from 1 to 100,000; got ''"),
        (["demo", "--batch", "1e3"], "argument --batch: expected an integer from 1 to 1,000,000; got '1e3'"),
        (["demo", "--min-count", "0"], "argument --min-count: expected an integer from 1 to 1,000,000; got '0'"),
        (["demo", "--seed", "-1"], "argument --seed: expected an integer from 0 to 4,294,967,295; got '-1'"),
        (["demo", "--lr", "0"], "argument --lr: expected a number from 1e-06 to 1; got '0'"),
        (["demo", "--lr", "nan"], "argument --lr: expected a number from 1e-06 to 1; got 'nan'"),
        (["demo", "--lr", "inf"], "argument --lr: expected a number from 1e-06 to 1; got 'inf'"),
        (["demo", "--lr", "fast"], "argument --lr: expected a number from 1e-06 to 1; got 'fast'"),
        (["demo", "--subsample", "2"], "argument --subsample: expected a number from 0 to 1; got '2'"),
        (["demo", "--words", " ,"], "argument --words: expected words separated by commas; got ' ,'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in only_line(err)


# ------------------------------------------------------------------------------------------------- bad input


def write(folder: Path, data: bytes) -> Path:
    path = folder / "input.txt"
    path.write_bytes(data)
    return path


TEXTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "no.txt", "{path}: No such file or directory"),
    "below a file": (lambda folder: write(folder, b"x") / "no.txt", "{path}: Not a directory"),
    "folder": (lambda folder: folder, "{path}: expected a text file; got a folder"),
    "device": (lambda folder: Path(os.devnull), "{path}: expected a text file; got a device"),
    "empty": (lambda folder: write(folder, b""), "{path}: expected text; the file is empty"),
    "blank": (lambda folder: write(folder, b"\n \n"), "{path}: expected text; the file is empty"),
    "binary": (lambda folder: write(folder, b"abc\0def"), "{path}: expected UTF-8 text; byte 3 is NUL"),
    "latin-1": (lambda folder: write(folder, b"na\xefve"), "{path}: expected UTF-8 text; byte 2 is 0xef"),
    "few": (lambda folder: write(folder, b"a few words"), "{path}: too few words to train on: 0 words, "),
    "pairless": (
        lambda folder: write(folder, planted_text().replace(" ", "\n\n").encode()),
        "too few words to train on: no two of them are left in one paragraph",
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_bad_text(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = TEXTS[case]
    path = make(tmp_path)
    out_folder = tmp_path / "out"
    assert main(["demo", "--text", str(path), "--out", str(out_folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert only_line(err).startswith("gpurms demo: error: " + message.format(path=path))
    assert not out_folder.exists()


def test_unknown_words(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--text", str(text_file), "--out", str(tmp_path), "--words", "rose, python"]) == 2
    message = "gpurms demo: error: --words: not among the 20 words of the text: python"
    assert only_line(capsys.readouterr().err) == message


def blocked_by_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file"


def blocked_by_a_folder(folder: Path) -> Path:
    (folder / "demo.png").mkdir()
    return folder


FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a file": (blocked_by_a_file, "cannot write to {path}: File exists"),
    "below a file": (lambda folder: blocked_by_a_file(folder) / "out", "cannot write to {path}: Not a directory"),
    "name taken": (blocked_by_a_folder, "cannot write {path}/demo.png: it is a folder"),
    # Not even root may write to these two.
    "not writable": (lambda folder: Path("/proc"), "cannot write to {path}: "),
    "not creatable": (lambda folder: Path("/proc/out"), "cannot write to {path}: "),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_folder_is_found_before_training(
    case: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "train", lambda *_: pytest.fail("trained before the folder was checked"))
    make, message = FOLDERS[case]
    path = make(tmp_path)
    if path.parts[:2] == ("/", "proc") and not Path("/proc/self").exists():
        pytest.skip("needs Linux's /proc")
    assert main(["demo", "--text", str(text_file), "--out", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert only_line(err).startswith("gpurms demo: error: " + message.format(path=path))


@pytest.mark.parametrize("package", ["matplotlib", "sklearn", "tqdm"])
def test_a_missing_package_is_named_with_its_extra(package: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from gpurms.__main__ import main; sys.exit(main())"
    done = python("-c", code, "demo", "--text", str(tmp_path / "never read"))
    assert done.returncode == 2
    line = only_line(done.stderr)
    assert line.startswith(
        "gpurms demo: error: needs the packages of the extra 'demo': pip install matplotlib scikit-learn tqdm ("
    )
    assert package in line


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("GPURMS_BACKEND", "cupy", "GPURMS_BACKEND=cupy, but no GPU is usable: "),
        ("GPURMS_BACKEND", "jax", "GPURMS_BACKEND must be auto, numpy or cupy; got 'jax'"),
        ("GPURMS_ENGINE", "fortran", "no engine can run: "),
    ],
)
def test_a_backend_that_is_not_to_be_had(variable: str, value: str, message: str, tmp_path: Path) -> None:
    code = "import sys; sys.modules['cupy'] = None; from gpurms.__main__ import main; sys.exit(main())"
    done = python("-c", code, "demo", "--out", str(tmp_path / "out"), **{variable: value})
    assert done.returncode == 2
    assert only_line(done.stderr).startswith(f"gpurms demo: error: {message}")


# ------------------------------------------------------------------------------------------------- whole runs


def check_files(folder: Path) -> int:
    """Check what a run left behind; returns the number of its steps."""
    assert sorted(path.name for path in folder.iterdir()) == ["demo.png", "embeddings.npz"]
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with np.load(folder / "embeddings.npz", allow_pickle=False) as saved:
        assert saved["input"].shape == saved["output"].shape == (len(saved["vocabulary"]), 8)
        assert np.isfinite(saved["input"]).all()
        assert saved["output"].any()
        return int(saved["optimizer_weight_0"])


def test_a_whole_run(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    words = ["--words", "Tide,rose"]
    done = python("-m", "gpurms", "demo", *QUICK, "--text", str(text_file), "--out", str(out), *words)
    assert done.returncode == 0, done.stderr
    assert check_files(out) > 10
    assert f"{text_file}: 3,600 words, 20 of them distinct" in done.stdout
    assert re.search(r"^tide +\d+  [a-z]+ 0\.\d\d ", done.stdout, re.MULTILINE)
    assert re.search(r"^rose +\d+  [a-z]+ 0\.\d\d ", done.stdout, re.MULTILINE)
    for name in ("embeddings.npz", "demo.png"):
        assert str(out / name) in done.stdout
    assert "words/s" in done.stderr
    assert "loss=" in done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("backend", ["cupy", "auto"])
def test_a_whole_run_on_a_device(
    device: Engine,
    backend: str,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GPURMS_BACKEND", backend)
    assert main(["demo", *QUICK, "--batch", "4096", "--text", str(text_file), "--out", str(tmp_path / "out")]) == 0
    assert check_files(tmp_path / "out") > 1
    assert ", cupy arrays, cuda engine\n" in capsys.readouterr().out


def test_a_run_overwrites_an_earlier_one_and_shows_letters_that_the_terminal_lacks(tmp_path: Path) -> None:
    text = tmp_path / "caf\udce9.txt"  # a name that is not UTF-8
    text.write_text(planted_text().replace("rose", "größe"))
    for name in ("demo.png", "embeddings.npz"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("from an earlier run")
    arguments = [*QUICK, "--text", str(text), "--out", str(tmp_path / "out"), "--words", "größe"]
    done = python("-m", "gpurms", "demo", *arguments, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    check_files(tmp_path / "out")
    assert r"gr\xf6\xdfe" in done.stdout


@pytest.fixture
def endless_run(text_file: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    arguments = ["demo", *QUICK, "--epochs", "100000", "--text", str(text_file), "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-m", "gpurms", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_ctrl_c_during_training_leaves_a_usable_result(endless_run: subprocess.Popen[str], tmp_path: Path) -> None:
    assert endless_run.stderr is not None
    shown = ""
    while "loss=" not in shown:
        shown += endless_run.stderr.read(1)
        assert endless_run.poll() is None, shown
    endless_run.send_signal(signal.SIGINT)
    out, err = endless_run.communicate(timeout=60)
    assert endless_run.returncode == 130
    assert "Traceback" not in err
    *_, line = err.splitlines()
    steps = check_files(tmp_path / "out")
    assert re.fullmatch(rf"gpurms demo: interrupted after {steps:,} of [\d,]+ steps; results so far follow", line)
    assert err.count("interrupted") == 1
    assert "nearest words" in out


def test_ctrl_c_at_another_moment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "python_documentation", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr() == ("", "gpurms: interrupted\n")
