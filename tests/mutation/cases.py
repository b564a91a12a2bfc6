"""Which launches judge the mutants of a file, and how a launch runs with another text."""

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import numpy as np

from gpurms.kernels.rule import FLOAT32
from tests import cuda_large
from tests.cuda_support import launch, text_instead
from tests.device import launch as device_launch
from tests.device import nvrtc, ptx
from tests.mutation import dense, norms, rows, sort
from tests.mutation.machine import device

Case = Callable[[], None]


def text(file: str) -> str:
    """A file of the kernels."""
    return launch.text(file)


@cache
def programs(case: Case) -> dict[str, tuple[tuple[str, ...], bytes, ptx.Module]]:
    """What a case compiles, by source: options, PTX and the module."""
    found = {}

    def module(source: str, options: tuple[str, ...]) -> ptx.Module:
        if source not in found:
            code = nvrtc.compile(source, options)
            found[source] = options, code, ptx.Module(code)
        return found[source][2]

    with text_instead("", ""), mock.patch.object(device_launch, "_module", module):
        case()
    return found


def same_code(case: Case, file: str, changed: str) -> bool:
    """Whether all that a case compiles stays as it was."""
    old = text(file)
    return all(
        nvrtc.compile(source.replace(old, changed), options) == code
        for source, (options, code, _) in programs(case).items()
        if old in source
    )


def run(case: Case, file: str, changed: str) -> None:
    """The case with another text in place of a file."""
    known = {source: module for source, (_, _, module) in programs(case).items()}

    def module(source: str, options: tuple[str, ...]) -> ptx.Module:
        if source not in known:
            known[source] = ptx.Module(nvrtc.compile(source, options))
        return known[source]

    with text_instead(file, changed), mock.patch.object(device_launch, "_module", module):
        case()


def large(launch_it: Callable[..., None], *arguments: Any, **options: Any) -> Case:
    """A launch on address space as a case."""

    def case() -> None:
        with device() as machine:
            launch_it(machine, *arguments, **options)

    case.__name__ = f"large {launch_it.__name__} {arguments} {options}"
    return case


LARGE_IDS = [cuda_large.TALL, 2**32 + 5, 7, 2**33, *[2**32 + 6] * 40, 2**33 + 1, 7]
LARGE_DENSE = [large(cuda_large.dense, FLOAT32, 0), large(cuda_large.dense, FLOAT32, 1)]
LARGE_ROWS = [
    large(cuda_large.sparse, (2**33 + 3,), LARGE_IDS),
    large(cuda_large.long_rows, 1, 2**31 + 9000),
    large(cuda_large.long_rows, 1, 2**31 + 9001, 2),
    large(cuda_large.many_ids, 2**30),
    large(cuda_large.long_rows, 66, 2**31 + 9001),
]


CASES: dict[str, list[Case]] = {
    "rmsprop.cuh": [
        dense.rule_with_everything,
        dense.rule_decoupled,
        dense.rule_centered,
        dense.rule_clipped,
        dense.rule_nesterov,
    ],
    "storage.cuh": [
        dense.plain_variables,
        dense.float16_and_bfloat16,
        dense.float64,
        dense.bfloat16_and_float16,
        dense.float64_and_bfloat16,
        dense.float64_and_float16,
        dense.bfloat16_and_float64,
        rows.packed_wide_rows,
        rows.wide_rows,
    ],
    "multi.cu": [
        dense.several_variables,
        dense.plain_variables,
        dense.replayed_variables,
        dense.packed_tiles,
        dense.left_out,
        *LARGE_DENSE,
    ],
    "rows.cu": [
        rows.hot_rows,
        rows.packed_rows,
        rows.strided_rows,
        rows.added_rows,
        rows.wide_rows,
        rows.packed_wide_rows,
        dense.replayed_rows,
        rows.rows_at_edges,
        rows.one_place_in_the_last_warp,
        rows.left_out,
        rows.hottest_row,
        *LARGE_ROWS,
        rows.hottest,
    ],
    "sort.cu": [
        sort.one_tile,
        sort.three_tiles,
        sort.tile_of_large_ids,
        sort.full_tile,
        sort.many_tiles,
        sort.ids_outside,
        large(cuda_large.check_of_ids, np.int32, 2**32 + 77),
    ],
    "norm.cu": [
        norms.norms_of_each,
        norms.norms_of_many,
        norms.norm_of_one_chunk,
        norms.norm_of_many_chunks,
        norms.norms_of_float64,
        large(cuda_large.norm, FLOAT32),
    ],
    "scalars.cu": [dense.scalars_on_the_device],
}
