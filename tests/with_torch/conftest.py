"""Fixtures of the tests of `gpurms.torch`."""

from collections.abc import Iterator

import pytest

from tests.with_torch import cuda_tensors

collect_ignore_glob = ["distributed_*_cases.py"]  # programs for ranks, whose imports make torch warn of itself


@pytest.fixture(params=cuda_tensors.GPUS)
def gpu(request: pytest.FixtureRequest) -> Iterator[cuda_tensors.Gpu]:
    """A real GPU, or an emulated one."""
    with cuda_tensors.running(request.param) as gpu:
        yield gpu
