"""The README's promises: its code runs, its table names every public member."""

import re
from pathlib import Path

import numpy as np
import pytest

import gpurms
from tests import engines

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def code(*needs: str) -> list[str]:
    """The blocks that import these libraries, of those that not all have."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 6
    return [block for block in blocks if {name for name in OPTIONAL if OPTIONAL[name] in block} == set(needs)]


OPTIONAL = {"cupy": "import cupy", "torch": "import torch", "mpi4py": "from gpurms.distributed"}


@pytest.mark.parametrize("seed", range(3))
def test_code_for_gpus_runs(seed: int, capsys: pytest.CaptureFixture[str]):
    (block,) = code("cupy")
    with engines.emulated(deferred=True, seed=seed):
        exec(block, {"gpurms": gpurms})
    assert capsys.readouterr().out == "4\n"


@pytest.mark.usefixtures("numpy_engine")
def test_code_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in code():
        exec(block, names)
    assert capsys.readouterr().out == "9.683772\n"
    table = names["table"]
    assert isinstance(table, np.ndarray)
    assert np.flatnonzero(table.any(axis=1)).tolist() == [3, 17]


def test_table_names_every_member():
    table = README[README.index("| member |") :]
    for name in dir(gpurms.RMSprop):
        if not name.startswith("_"):
            assert re.search(rf"`[^`]*\b{name}\b[^`]*`", table), f"{name} is not in the table"


FIGURES = {
    "cpu": {
        "gpurms Numba / floor": "1.08x its time",
        "TF ResourceApplyRMSProp / gpurms Numba": "2.29x faster",
        "torch foreach / gpurms Numba": "6.6x faster",
        "tf_keras legacy / gpurms Numba": "8.5x faster",
        "torch SparseAdam / gpurms Numba": "5.7x faster",
        "gpurms Numba, per variable": "3.1 us per variable",
    },
    "torch": {
        "torch foreach, plain / gpurms.torch, plain": "5.66x faster",
        "torch foreach, momentum / gpurms.torch, momentum": "5.16x faster",
        "gpurms.torch, per tensor": "4.8 us per tensor",
        "torch foreach / gpurms.torch": "2.71x faster",
        "torch SparseAdam / gpurms.torch": "4.76x faster",
    },
}


@pytest.mark.parametrize("suite", FIGURES)
def test_figures_are_those_of_the_run_it_names(suite: str):
    (name,) = re.findall(rf"bench/results/{suite}-[\w-]+\.md", README)
    results = (Path(__file__).parent.parent / name).read_text(encoding="utf-8")

    def median(figure: str) -> float:
        return float(re.search(rf"^\| {re.escape(figure)} \| ([\d.]+)", results, re.MULTILINE)[1])

    for figure, shown in FIGURES[suite].items():
        assert shown in README
        assert abs(float(re.match(r"[\d.]+", shown)[0]) - median(figure)) <= 0.051, figure


def test_commands_exist():
    tasks = re.findall(r"^    python3 dev\.py (\w+)", README, re.MULTILINE)
    assert tasks[:2] == ["demo", "test"]
