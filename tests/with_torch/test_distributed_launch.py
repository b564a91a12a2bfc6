"""How ranks are waited for: hangs and failures are found, and no process is left."""

import subprocess
import sys

import pytest

from tests.with_torch.distributed_launch import Outcomes, wait


def processes(*programs: str) -> list[subprocess.Popen[bytes]]:
    return [subprocess.Popen([sys.executable, "-c", program]) for program in programs]


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        (("pass", "pass"), ""),
        (("import time; time.sleep(60)", "pass"), "stopped after 1 s"),
        (("import time; time.sleep(60)", "raise SystemExit(3)"), "stopped after the failure of a rank"),
        (("import time; time.sleep(60)", "import os; os.abort()"), "stopped after the failure of a rank"),
    ],
)
def test_wait(programs: tuple[str, ...], said: str):
    ranks = processes(*programs)
    assert wait(ranks, timeout=1 if said.startswith("stopped after 1") else 30) == said
    assert all(rank.returncode is not None for rank in ranks)


def test_a_case_must_pass_on_every_rank():
    outcomes = Outcomes([{"good": "", "bad": ""}, {"good": "", "bad": "KeyError"}, {"good": ""}], "output")
    outcomes.check("good")
    with pytest.raises(AssertionError, match="rank 1: KeyError\nrank 2: not reached: a case before it failed\noutput"):
        outcomes.check("bad")
