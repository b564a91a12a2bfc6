"""What do a thousand small variables cost, on the host and on the device?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cupy

from bench.answer import Answer, Goal, Series, name_of
from bench.gpu.stage import Stage, Wait, attempt, counted, synchronize
from bench.measure import Missing, Ready, Step
from bench.peers import EPSILON, LR, RHO, load
from gpurms import RMSprop

OURS, GRAPH = "gpurms", "gpurms, replayed graph"
NAIVE, FOREACH, COMPILED, OPTAX = "naive CuPy", "torch foreach", "torch.compile", "optax jit"
LAUNCHES, PROFILED = "launches", "profiler"
PEERS = (FOREACH, OPTAX, COMPILED)
SIZE = 1024


def run(quick: bool) -> Iterator[Answer]:
    count, rounds = (10, 2) if quick else (1000, 41)
    setting = (
        f"plain rule, {count:,} float32 variables of {SIZE:,} elements, new gradient arrays at every step; host: until "
        "the step returns, the device being idle; both: until its work is done; device: by events, the cache emptied "
        "before each step; the graph replays one step"
    )
    answer = Answer("many", f"{count:,} variables of {SIZE:,} elements", setting)
    yield answer
    stage = Stage(quick)
    with attempt(answer, LAUNCHES):
        _count(answer, stage, count)
    _judge(answer)
    yield answer
    for who in (OURS, GRAPH, FOREACH, OPTAX):
        with attempt(answer, who):
            _measure(answer, stage, who, count, rounds)
        _judge(answer)
        yield answer
    with attempt(answer, PROFILED):
        _profile(answer, stage, count)
    yield answer
    with attempt(answer, COMPILED):  # last: it may take all the time that is left
        _measure(answer, stage, COMPILED, count, rounds)
    _judge(answer)
    yield answer


def _judge(answer: Answer) -> None:
    """The figures that what is measured so far allows."""
    answer.figures.clear()
    _bound(answer, LAUNCHES, "", "gpurms's kernels per step", Goal("<=", 2))
    _bound(answer, name_of(OURS, time="host"), "ms", "host time of a step", Goal("<=", 0.4))
    _bound(answer, name_of(GRAPH, time="each of many"), "us", "a replayed graph, of many in a row", Goal("<", 30))
    _bound(answer, name_of(GRAPH, time="device"), "us", "a replayed graph, on the device", Goal("<", 30))
    for who in PEERS:
        answer.compare(who, OURS, Goal(">=", 1), time="both")
        answer.compare(who, OURS, time="host")


def _bound(answer: Answer, series: str, unit: str, what: str, goal: Goal) -> None:
    values = answer.values(series)
    if values is None:
        answer.add_skipped(what, unit, goal, series)
        return
    scaled = [value * {"": 1, "ms": 1e3, "us": 1e6}[unit] for value in values]
    answer.add(what, unit, scaled, goal, min(scaled))


def _measure(answer: Answer, stage: Stage, who: str, count: int, rounds: int) -> None:
    if who == GRAPH:
        _replay(answer, stage, count, rounds)
        return
    ready, wait = _contestant(stage, who, count)
    ready()()  # compiles
    wait()
    answer.measured("s", stage.host_times(ready, rounds), who, time="host")
    answer.measured("s", stage.host_times(ready, rounds, wait), who, time="both")
    if who != OPTAX:  # whose streams our events do not see
        answer.measured("s", stage.device_times(ready, rounds), who, time="device")


def _contestant(stage: Stage, who: str, count: int) -> tuple[Ready, Wait]:
    if who == OPTAX:
        ready, wait = load("optax").fresh(count, SIZE)
        return ready, wait
    if who in (FOREACH, COMPILED):
        return load("torch_cuda").fresh(count, SIZE, who == COMPILED), synchronize
    return _ours(stage, count), synchronize


def _ours(stage: Stage, count: int) -> Ready:
    variables, source = _arrays(stage, count)
    optimizer = RMSprop(LR, RHO, epsilon=EPSILON)

    def ready() -> Step:
        grads = [grad.copy() for grad in source]
        return lambda: optimizer.apply_gradients(zip(grads, variables))

    return ready


def _arrays(stage: Stage, count: int) -> tuple[list[Any], list[Any]]:
    return [stage.noise(SIZE) for _ in range(count)], [stage.noise(SIZE, seed=1) for _ in range(count)]


def _count(answer: Answer, stage: Stage, count: int) -> None:
    ready = _ours(stage, count)
    ready()()
    step = ready()
    with counted() as names:
        step()
    synchronize()
    answer.series.append(Series(LAUNCHES, "", [len(names)]))


def _profile(answer: Answer, stage: Stage, count: int) -> None:
    """What another library's profiler sees of one step."""
    peer = load("torch_cuda")
    ready = _ours(stage, count)
    ready()()
    step = ready()
    synchronize()
    names = peer.kernels(step)
    if not names:
        raise Missing("it saw nothing")
    answer.notes.append(f"on the device during one step, as PyTorch's profiler sees it: {', '.join(names[:20])}")
    answer.series.append(Series(PROFILED, "", [len(names)]))


def _replay(answer: Answer, stage: Stage, count: int, rounds: int) -> None:
    variables, grads = _arrays(stage, count)
    optimizer = RMSprop(LR, RHO, epsilon=EPSILON, capturable=True)
    stream = cupy.cuda.Stream(non_blocking=True)
    synchronize()
    with stream:
        optimizer.apply_gradients(zip(grads, variables))
        graph = capture(stream, lambda: optimizer.apply_gradients(zip(grads, variables)))

        def launch() -> None:
            graph.launch(stream)

        answer.measured("s", stage.wall_times(launch, stream.synchronize), GRAPH, time="each of many")
        answer.measured("s", stage.host_times(lambda: launch, rounds), GRAPH, time="host")
        answer.measured("s", stage.host_times(lambda: launch, rounds, stream.synchronize), GRAPH, time="both")
        answer.measured("s", stage.device_times(lambda: launch, rounds), GRAPH, time="device")


def capture(stream: Any, step: Step) -> Any:
    """The graph of a step; a step that fails leaves no capture open."""
    stream.begin_capture()
    try:
        step()
    except BaseException:
        stream.end_capture()
        raise
    return stream.end_capture()
