"""Does a second process compile anything?"""

from __future__ import annotations

import tempfile

from bench import child, engines
from bench.answer import Answer, Goal, Series
from bench.measure import Missing

BEGIN = """
import gc, json, time
import numpy as np
import gpurms
from numba.core import event
from numba.core.dispatcher import Dispatcher

compiled = event.RecordingListener()
event.register("numba:compile", compiled)
table = np.ones((100, 8), np.float32)
start = time.perf_counter()
gpurms.RMSprop().apply_gradients([(np.ones_like(table), table)])
first = time.perf_counter() - start
"""
MORE = """
sparse = gpurms.IndexedSlices(np.ones((3, 8), np.float32), np.array([3, 1, 3]))
gpurms.RMSprop(momentum=0.9, centered=True, clipnorm=1.0).apply_gradients([(sparse, table)])
gpurms.RMSprop(clipnorm=1.0).apply_gradients([(np.ones(9), np.ones(9))])
"""
END = """
total = time.perf_counter() - start
begun = sum(happened.is_start for _, happened in compiled.buffer)
loaded = sum(sum(found.stats.cache_hits.values()) for found in gc.get_objects() if isinstance(found, Dispatcher))
print(json.dumps({"compiled": begun, "loaded": loaded, "first": first, "total": total}))
"""
FIRST, SECOND = "first process", "second process"


def run(quick: bool) -> Answer:
    setting = (
        "Numba imported; a dense step (first), then a sparse and a clipped one (total); both processes share a cache"
    )
    answer = Answer("compiling", "compilation", setting)
    try:
        engines.require("numba")
    except Missing as missing:
        answer.skipped[engines.NUMBA] = str(missing)
        return answer
    code = BEGIN + END if quick else BEGIN + MORE + END
    with tempfile.TemporaryDirectory() as cache:
        for process in (FIRST, SECOND):
            found = child.run(code, NUMBA_CACHE_DIR=cache, GPURMS_ENGINE="numba")
            goal = Goal("<=", 0) if process == SECOND else None
            for what, key, bound in (("functions compiled", "compiled", goal), ("functions loaded", "loaded", None)):
                answer.add(f"{process}: {what}", "", [found[key]], bound)
            answer.series += [Series(f"{process}, {key}", "s", [found[key]]) for key in ("first", "total")]
    answer.add_ratio(f"{FIRST}, first", f"{SECOND}, first")
    answer.add_ratio(f"{FIRST}, total", f"{SECOND}, total")
    return answer
