"""Changes of one token in the CUDA text do not pass unseen.

A normal run judges a tenth of the mutants, the same ones every time; `GPURMS_MUTANTS=all` judges all of them, and
`python -m tests.mutants` prints them.
"""

import os

import pytest

pytest.importorskip("tests.device_support", reason="CuPy and NVRTC are needed")

from tests import mutants
from tests.mutation import cases

PARTS = 40
CHOSEN = PARTS if os.environ.get("GPURMS_MUTANTS") == "all" else PARTS // 10


@pytest.mark.parametrize("part", range(CHOSEN))
def test_mutants_are_caught_but_for_those_known(part: int) -> None:
    fates = {}
    for file in mutants.FILES:
        for mutant in mutants.mutants(file):
            if mutants.sampled(mutant, part, PARTS):
                fates[mutant.key(cases.text(file))] = mutants.judge(mutant)
    found = {key for key, fate in fates.items() if fate.startswith(("survived", "not run"))}
    assert found == mutants.survivors().keys() & fates.keys()


def test_95_of_100_mutants_are_caught() -> None:
    """The known survivors, by file and in all, are few among those that compile to other code."""
    known = mutants.survivors()
    names = {mutant.key(cases.text(file)) for file in mutants.FILES for mutant in mutants.mutants(file)}
    assert known.keys() <= names, "survivors of a text that is no more: run python -m tests.mutants"
    assert all(known.values()), "a survivor without a reason"
    assert len(known) <= 0.05 * mutants.judged()


@pytest.mark.parametrize("file", mutants.FILES)
def test_the_text_as_it_is_passes(file: str) -> None:
    for case in cases.CASES[file]:
        cases.run(case, file, cases.text(file) + "\n// changed")


def test_tokens_that_change() -> None:
    """Comments, signatures, types and includes stay; operators, numbers, names and statements do not."""
    found = {(mutant.old, mutant.new) for mutant in mutants.mutants("sort.cu")}
    assert {("<", "<="), ("8", "9"), ("__syncthreads();", ";"), ("threadIdx", "blockIdx")} <= found
    text = (mutants.FOLDER / "sort.cu").read_text(encoding="utf-8")
    for mutant in mutants.mutants("sort.cu"):
        line = text[text.rfind("\n", 0, mutant.at) + 1 : mutant.at]
        assert "//" not in line
        assert not line.startswith(("#define", "__device__ __forceinline__ void", "extern")) or "{" in line
        assert mutant.apply(text) != text
