"""The benchmark of the drop-in runs; a quick run judges nothing."""

import json
from pathlib import Path

import pytest

from bench import __main__ as bench


def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert bench.main(["torch", "--quick", "--out", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("*.json")
    record = json.loads(written.read_text())
    assert record["suite"] == "torch"
    answers = {answer["name"]: answer for answer in record["questions"]}
    assert list(answers) == ["large", "host", "rows", "cuda"]
    for name in ("large", "host", "rows"):
        assert not answers[name]["skipped"]
        assert all(figure["median"] > 0 and figure["met"] is None for figure in answers[name]["figures"])
    assert "gpurms.torch, per tensor" in capsys.readouterr().out
