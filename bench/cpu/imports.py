"""What does ``import gpurms`` add to ``import numpy``?"""

from __future__ import annotations

from bench import child
from bench.answer import Answer, Goal

CODE = """
import time
start = time.perf_counter()
import numpy
middle = time.perf_counter()
import gpurms
print([middle - start, time.perf_counter() - middle])
"""


def run(quick: bool) -> Answer:
    rounds = 3 if quick else 21
    child.run(CODE)  # compiles to bytecode
    seconds = [child.run(CODE) for _ in range(rounds)]
    numpy, own = (list(column) for column in zip(*seconds))

    answer = Answer("imports", "time to import", f"{rounds} fresh processes, bytecode cached")
    answer.add_times({"import numpy": numpy, "import gpurms, after it": own}, {})
    milliseconds = [value * 1e3 for value in own]
    answer.add("import gpurms beyond import numpy", "ms", milliseconds, Goal("<", 50), min(milliseconds))
    return answer
