"""The README's promises: its code runs, its table names every public member."""

import re
from pathlib import Path

import numpy as np
import pytest

import gpurms

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("numpy_engine")
def test_code_runs(capsys: pytest.CaptureFixture[str]):
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
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


def test_commands_exist():
    tasks = re.findall(r"^    python3 dev\.py (\w+)", README, re.MULTILINE)
    assert tasks[:2] == ["demo", "test"]
