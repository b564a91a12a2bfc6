"""What does a parameter tensor cost that is too small to matter?"""

from __future__ import annotations

from bench.answer import Answer, Goal
from bench.measure import Race
from bench.torch.contestants import FOR_LOOP, FOREACH, GPURMS, fresh, parameters

SIZE, N_GROUPS = 256, 50
IN_GROUPS = f", {N_GROUPS} groups"


def run(quick: bool) -> Answer:
    count, rounds = (10, 3) if quick else (1000, 41)
    race = Race()
    for name in (GPURMS, FOREACH, FOR_LOOP):
        race.enter(name, lambda name=name: fresh(name, parameters([SIZE] * count)))
    for name in (GPURMS, FOREACH):
        race.enter(name + IN_GROUPS, lambda name=name: fresh(name, parameters([SIZE] * count), N_GROUPS))
    title = f"{count:,} parameter tensors of {SIZE} elements"
    answer = Answer("host", title, f"plain rule, float32, new gradient tensors at every step, {rounds} rounds")
    answer.add_times(race.run(rounds), race.skipped)
    for series in list(answer.series):
        micro = [seconds / count * 1e6 for seconds in series.values]
        answer.add(
            f"{series.name}, per tensor", "us", micro, Goal("<", 5) if series.name == GPURMS else None, min(micro)
        )
    for name in (FOREACH, FOR_LOOP):
        answer.add_ratio(name, GPURMS)
    answer.add_ratio(FOREACH + IN_GROUPS, GPURMS + IN_GROUPS)
    return answer
