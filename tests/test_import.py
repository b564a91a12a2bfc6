"""What `import gpurms` imports, and the choice of the array library with and without a usable CuPy.

Each test runs a program in a process of its own. CuPy is played by a package of a few lines.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = (
    "autograd",
    "cupy",
    "cuda",
    "h5py",
    "jax",
    "keras",
    "matplotlib",
    "ml_dtypes",
    "mpi4py",
    "numba",
    "optax",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorflow",
    "torch",
    "tqdm",
)

FAKE_CUPY = """
__version__ = "14.2.0"
{on_import}

class ndarray:
    shape, ndim, size, dtype = (2,), 1, 2, "float32"

class cuda:
    @staticmethod
    def is_available():
        {is_available}
"""
UNUSABLE = {  # situation -> what the fake CuPy does, and what the error must say
    "no CuPy": ("raise ModuleNotFoundError('No module named cupy', name='cupy')", "", ""),
    "library missing": ("raise ImportError('libcudart.so.13: cannot open shared object')", "", "libcudart.so.13"),
    "library broken": ("raise OSError('libcuda.so.1: file too short')", "", "libcuda.so.1"),
    "no driver": ("", "raise RuntimeError('cudaErrorInsufficientDriver')", "cudaErrorInsufficientDriver"),
    "no device": ("", "return False", ""),
}


def run(code: str, cupy: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with gpurms, and the fake CuPy in the folder `cupy`, on the path."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("GPURMS_", "PYTHON"))}
    inherited["GPURMS_ENGINE"] = "numpy"  # importing Numba takes longer than all else
    path = os.pathsep.join(str(p) for p in (cupy, ROOT) if p is not None)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def succeeds(code: str, cupy: Path | None = None, **env: str) -> list[str]:
    """The words that the program prints."""
    done = run(code, cupy, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def fake_cupy(folder: Path, on_import: str = "", is_available: str = "return True") -> Path:
    (folder / "cupy").mkdir()
    text = FAKE_CUPY.format(on_import=on_import, is_available=is_available or "return True")
    (folder / "cupy" / "__init__.py").write_text(text)
    return folder


@pytest.fixture(params=UNUSABLE)
def unusable(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A folder with a CuPy that cannot be used, and the reason that an error must give."""
    on_import, is_available, reason = UNUSABLE[request.param]
    return fake_cupy(tmp_path, on_import, is_available), reason


@pytest.fixture
def usable(tmp_path: Path) -> Path:
    return fake_cupy(tmp_path)


STEP = """
import numpy as np
from gpurms import RMSprop, Variable
var, array = Variable([1.0, 2.0]), np.ones(2, np.float32)
opt = RMSprop(0.5, rho=0.0, epsilon=0.0)
opt.apply_gradients([(np.ones(2, np.float32), var), (np.ones(2, np.float32), array)])
print(type(var.value).__module__, *var.numpy(), *array)
"""
STEPPED = ["numpy", "0.5", "1.5", "0.5", "0.5"]
WHICH = "import gpurms; print(gpurms.array_module().__name__)"


# --- imports ------------------------------------------------------------------------------------------------


def test_import_imports_nothing_optional():
    code = "import sys; before = set(sys.modules); import gpurms; print(*(set(sys.modules) - before))"
    imported = {name.partition(".")[0] for name in succeeds(code)}
    assert "numpy" in imported
    assert imported.isdisjoint(OPTIONAL)


@pytest.mark.parametrize("backend", ["auto", "numpy", "cupy", "garbage"])
def test_import_asks_neither_cupy_nor_the_driver(backend: str, tmp_path: Path):
    cupy = fake_cupy(tmp_path, "raise SystemExit('cupy was imported')")
    succeeds("import gpurms", cupy, GPURMS_BACKEND=backend)


@pytest.mark.parametrize("missing", ["numba", "ml_dtypes", "cupy", "torch"])
def test_works_without(missing: str):
    code = f"import sys; sys.modules[{missing!r}] = None\n{STEP}"
    assert succeeds(code, GPURMS_ENGINE="auto" if missing == "numba" else "numpy") == STEPPED


def test_public_names():
    names = "RMSprop, Variable, IndexedSlices, GradientTape, gather, schedules, array_module"
    succeeds(f"from gpurms import {names}")


# --- array_module -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "auto", "numpy"])
def test_numpy_where_cupy_is_unusable(unusable: tuple[Path, str], backend: str | None):
    env = {} if backend is None else {"GPURMS_BACKEND": backend}
    assert succeeds(WHICH, unusable[0], **env) == ["numpy"]


def test_works_the_same_where_cupy_is_unusable(unusable: tuple[Path, str]):
    assert succeeds(STEP, unusable[0]) == STEPPED


@pytest.mark.parametrize(("backend", "name"), [(None, "cupy"), ("auto", "cupy"), ("cupy", "cupy"), ("numpy", "numpy")])
def test_backend_where_cupy_is_usable(usable: Path, backend: str | None, name: str):
    env = {} if backend is None else {"GPURMS_BACKEND": backend}
    assert succeeds(WHICH, usable, **env) == [name]


def test_numpy_backend_does_not_import_cupy(tmp_path: Path):
    cupy = fake_cupy(tmp_path, "raise SystemExit('cupy was imported')")
    assert succeeds(STEP, cupy, GPURMS_BACKEND="numpy") == STEPPED


def test_forced_cupy_that_is_unusable(unusable: tuple[Path, str]):
    cupy, reason = unusable
    done = run(WHICH, cupy, GPURMS_BACKEND="cupy")
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("RuntimeError: ")
    assert "GPURMS_BACKEND" in error
    assert "pip install" in error
    assert reason in error


def test_forced_cupy_leaves_numpy_arrays_alone(unusable: tuple[Path, str]):
    code = STEP.replace("Variable([1.0, 2.0])", "Variable(np.array([1, 2], np.float32))")
    assert succeeds(code, unusable[0], GPURMS_BACKEND="cupy") == STEPPED


@pytest.mark.parametrize("backend", ["garbage", "torch", "cuda"])
def test_unknown_backend(backend: str):
    done = run(WHICH, GPURMS_BACKEND=backend)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    for part in ("GPURMS_BACKEND", backend, "auto", "numpy", "cupy"):
        assert part in error


def test_gradient_of_another_library_names_both(usable: Path):
    code = (
        "import cupy, numpy as np, gpurms\n"
        "var = gpurms.Variable(np.ones(2, np.float32), name='embedding')\n"
        "try: gpurms.RMSprop().apply_gradients([(cupy.ndarray(), var)])\n"
        "except TypeError as error: print(error)"
    )
    words = " ".join(succeeds(code, usable))
    for part in ("embedding", "cupy", "numpy"):
        assert part in words.lower()
