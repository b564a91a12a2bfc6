"""`gpurms.distributed` on 2 and 4 ranks: each module of cases is started once per number of ranks."""

from functools import cache

import pytest

from tests.with_mpi import average_cases, nccl_cases, ranks, table_cases, training_cases
from tests.with_mpi.launch import launch

CASES = [
    (module.__name__, case)
    for module in (average_cases, nccl_cases, table_cases, training_cases)
    for case in ranks.names(module)
]
outcomes = cache(launch)


@pytest.mark.parametrize(("module", "case"), CASES)
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_case(n_ranks: int, module: str, case: str):
    outcomes(module, n_ranks).check(case)
