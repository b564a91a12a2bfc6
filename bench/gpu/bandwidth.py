"""How fast can this device copy?"""

from __future__ import annotations

from collections.abc import Iterator

from bench.answer import Answer, Series
from bench.gpu.stage import Stage


def run(quick: bool) -> Iterator[Answer]:
    setting = "device-to-device copies of up to 2 GiB, bytes read and written, by events"
    answer = Answer("bandwidth", "the speed of memory", setting)
    rates = Stage(quick).copy_rates()
    answer.series.append(Series("copy", "GB/s", rates))
    answer.add("copy bandwidth", "GB/s", rates, best=max(rates))
    yield answer
