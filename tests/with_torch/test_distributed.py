"""`gpurms.torch.RMSprop` under torch's distributed engines, on 2 and 4 ranks, against one process.

All cases run in two launches: of four ranks, which leave checkpoints behind, then of two, which load them.
"""

from pathlib import Path

import pytest

from tests.with_torch.distributed_launch import Outcomes, launch
from tests.with_torch.distributed_ranks import names

MODULES = {
    "DDP": "distributed_ddp_cases",
    "FSDP2": "distributed_fsdp_cases",
    "FSDP1": "distributed_fsdp1_cases",
    "DTensor": "distributed_tensor_cases",
    "ZeRO": "distributed_zero_cases",
    "checkpoint": "distributed_checkpoint_cases",
}
CASES = [
    pytest.param(f"{module}:{case}", id=f"{engine}: {case}")
    for engine, module in MODULES.items()
    for case in names(module)
]
ENGINES = {4: "numpy", 2: "auto"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Outcomes]:
    folder: Path = tmp_path_factory.mktemp("shared")
    return {
        n_ranks: launch(list(MODULES.values()), n_ranks, folder, GPURMS_ENGINE=engine)
        for n_ranks, engine in ENGINES.items()
    }


@pytest.mark.parametrize("n_ranks", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_case(outcomes: dict[int, Outcomes], n_ranks: int, case: str):
    outcomes[n_ranks].check(case)
