"""Mutants of the CUDA text: one token changed at a time, and what the launches of tests/mutation make of each.

    python -m tests.mutants                     # all, on all cores; minutes
    python -m tests.mutants --only rows.cu      # of one file
    python -m tests.mutants --write table.json  # every mutant and its fate

A mutant is caught if the interpreter finds a fault (bounds, race, alignment, barrier, endless loop) or a result has
other bits than NumPy's. One that does not compile, or compiles to the same PTX in every case, is none.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent.parent / "gpurms" / "kernels"
FILES = ("rmsprop.cuh", "storage.cuh", "multi.cu", "rows.cu", "sort.cu", "norm.cu", "scalars.cu")
SURVIVORS = Path(__file__).parent / "cuda_survivors.json"


class Mutant(NamedTuple):
    """`text[at : at + len(old)]` of a file becomes `new`."""

    file: str
    at: int
    old: str
    new: str

    def apply(self, text: str) -> str:
        assert text[self.at :].startswith(self.old)
        return text[: self.at] + self.new + text[self.at + len(self.old) :]

    def key(self, text: str) -> str:
        """A name that does not change when lines are added elsewhere: function, line with the place marked, new."""
        start = text.rfind("\n", 0, self.at) + 1
        end = text.find("\n", self.at + len(self.old))
        before = text[:start].split("\n")
        function = FUNCTION.findall("\n".join(before))
        line = f"{text[start : self.at]}[{self.old} -> {self.new}]{text[self.at + len(self.old) : end]}".strip()
        twin = [each.strip() for each in before].count(text[start:end].strip())
        return f"{self.file}: {function[-1] if function else ''}: {line}" + (f" #{twin + 1}" if twin else "")


FUNCTION = re.compile(
    r"^(?:template <[^\n]*> )?(?:__device__|extern|struct)[^\n;=]*? (?!__launch_bounds__)(\w+)(?:\(|$)", re.MULTILINE
)


# ------------------------------------------------------------------------------------------------------ generation

OPERATORS = {
    "<": ("<=", ">"),
    "<=": ("<", ">="),
    ">": (">=", "<"),
    ">=": (">", "<="),
    "==": ("!=",),
    "!=": ("==",),
    "+": ("-", "*"),
    "-": ("+",),
    "*": ("+", "/"),
    "/": ("*", "%"),
    "%": ("/", "*"),
    "&": ("|", "^"),
    "|": ("&", "^"),
    "^": ("|",),
    "<<": (">>",),
    ">>": ("<<",),
    "&&": ("||",),
    "||": ("&&",),
    "!": ("",),
    "~": ("",),
    "++": ("--",),
    "+=": ("-=", "="),
    "-=": ("+=", "="),
    "*=": ("+=", "/="),
    "/=": ("*=",),
    "|=": ("&=", "="),
    "&=": ("|=", "="),
    "%=": ("/=",),
    "^=": ("|=",),
    "<<=": (">>=",),
    ">>=": ("<<=",),
    "?": ("&& false ?", "|| true ?"),
}
WORDS = {
    "true": ("false",),
    "false": ("true",),
    "threadIdx": ("blockIdx",),
    "blockIdx": ("threadIdx",),
    "gridDim": ("blockDim",),
    "atomicMin": ("atomicMax",),
    "__popc": ("__clz",),
    "__clz": ("__popc",),
    "__ffs": ("__clz",),
    "__ffsll": ("__clzll",),
    "__shfl_up_sync": ("__shfl_down_sync",),
    "__double2float_rz": ("__double2float_rn",),
    "__double2loint": ("__double2hiint",),
    "__double2hiint": ("__double2loint",),
    "sqrt": ("",),
    "int64": ("int",),
    "uint64": ("uint32",),
}
FLAGS = {
    *("CLIP_VALUE", "HAS_FACTOR", "MAXIMIZE", "L2", "DECOUPLED", "CENTERED", "HAS_MOMENTUM", "NESTEROV", "EPS_IN_SQRT"),
    *("LR_IN_MOMENTUM", "ADD_ROWS", "PACKED", "DIMS", "packed", "valid", "head", "continues", "begins", "last"),
    *("outside", "edge", "whole"),
}
NAMES = {  # of one kind: each is taken for the next, and for the one after that
    "rmsprop.cuh": (
        "var rms mom mg",
        "g u d den step",
        "lr one_minus_rho momentum epsilon weight_decay lr_weight_decay clipvalue",
        "g factor",
    ),
    "storage.cuh": ("i j", "thread n_threads", "x y z w", "low high middle", "count tile"),
    "multi.cu": ("var grad rms mom mg factor", "n start", "count tile", "scalars live skip"),
    "rows.cu": (
        "first place began beyond end earlier limit",
        "lane warp at",
        "row left column",
        "row_size n_rows stride",
        "thread n_threads group",
        "keys order",
        "start count slot",
        "span reach FAN_IN",
        "var rms mom mg",
        "heads found heads_before",
        "low high next probe",
        "n_slabs n_units slab",
        "sums values",
    ),
    "sort.cu": (
        "lane warp",
        "keys order ids",
        "count total base",
        "digit shift",
        "keys_out order_out",
        "keys_a keys_b",
        "order_a order_b",
        "first at",
        "sum total before",
        "n n_rows",
        "THREADS ITEMS DIGITS TILE WARPS",
    ),
    "norm.cu": (
        "n start first_tile place",
        "sums chunk_sums part",
        "LANES THREADS CHUNK",
        "lane half left",
        "norm factor clip total sum",
        "factors double_factors",
        "i k",
    ),
    "scalars.cu": ("live scalars",),
}

# Launch bounds say nothing of results; test_cuda_compile.py sees what they are for.
TOKEN = re.compile(
    r"""(?P<skip>//[^\n]*|\#(?:define|else|endif|pragma)[^\n]*|\#if\ __CUDA_ARCH__[^\n]*|typedef[^\n]*
        |constexpr\ int\ MIN_BLOCKS[^\n]*
        |(?<=\w)<[\w ,*]+>|(?<=\w)\*+(?=[ )])|->|\w+_cast\b)
    |(?P<string>"[^"\n]*")
    |(?P<number>\b(?:0[xX][0-9a-fA-F]+|\d+))[uUlL]*\b
    |(?P<word>[A-Za-z_]\w*)
    |(?P<operator>(?<=[ ])(?:<<=|>>=|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%|&^]=|[-+*/%<>&|^?])(?=[ ])|\+\+|[!~-])""",
    re.VERBOSE,
)
SIGNATURE = re.compile(
    r"^(?:template <[^\n]*?>\s*)?(?:__device__|extern)[^{;]*?\)(?: const)?\s*\{|^template [^\n]*", re.MULTILINE
)
DECLARATION = re.compile(
    r"^ +(?:__shared__ )?(?!return|break|continue)[\w<>:,*]+(?: \w+)*[ *&]+(?:\(&)?\w+(?:[,\[][^\n=()]*)?;",
    re.MULTILINE,
)
STATEMENT = re.compile(
    r"^ +(?! )(?!(?:return|constexpr|struct|using|for|if|else)\b)([^\n#{}]*;)(?=[ ]*(?://|\n))", re.MULTILINE
)


def mutants(file: str) -> list[Mutant]:
    """Every change of one token of a file, in the order of the text."""
    text = (FOLDER / file).read_text(encoding="utf-8")
    found = [Mutant(file, at, old, new) for at, old, new in _changes(file, text)]
    return sorted(set(found))


def _changes(file: str, text: str) -> Iterator[tuple[int, str, str]]:
    neighbours: dict[str, set[str]] = {}
    reach = 2 if file == "rmsprop.cuh" else 1
    for group in NAMES[file]:
        names = group.split()
        for i, name in enumerate(names):
            neighbours.setdefault(name, set()).update({names[(i + k + 1) % len(names)] for k in range(reach)} - {name})
    declared = [match.span() for pattern in (SIGNATURE, DECLARATION) for match in pattern.finditer(text)]
    for match in TOKEN.finditer(text):
        kind, old, at = match.lastgroup, match[0], match.start()
        if any(start <= at < end for start, end in declared):
            continue
        if kind == "number":
            yield from ((at, match["number"], new) for new in _numbers(match["number"]))
        elif kind == "word":
            new = set(WORDS.get(old, ())) | neighbours.get(old, set()) | ({f"!{old}"} if old in FLAGS else set())
            yield from ((at, old, each) for each in sorted(new))
        elif kind == "operator":
            unary = old == "-" and text[at + 1] != " "
            yield from ((at, old, each) for each in ([""] if unary else OPERATORS[old]))
    for match in STATEMENT.finditer(text):
        if not any(start <= match.start(1) < end for start, end in declared):
            yield match.start(1), match[1], ";"


def _numbers(old: str) -> list[str]:
    value = int(old, 0)
    form = hex if old[:2].lower() == "0x" else str
    return [form(value + 1), *([form(value - 1)] if value else [])]


# ------------------------------------------------------------------------------------------------------- judgement


def judge(mutant: Mutant) -> str:
    """What becomes of a mutant: "caught by ...", "survived", "does not compile" or "same code"."""
    from cupy.cuda.compiler import CompileException

    from tests.device import nvrtc
    from tests.device.ptx import Fault
    from tests.mutation import cases

    nvrtc._compile.cache_clear()  # of texts that never come again
    changed = mutant.apply(cases.text(mutant.file))
    same = True
    for case in cases.CASES[mutant.file]:
        try:
            if cases.same_code(case, mutant.file, changed):
                continue
            same = False
            cases.run(case, mutant.file, changed)
        except CompileException:
            return "does not compile"
        except AssertionError:
            return f"caught by {case.__name__}: other bits"
        except Fault as fault:
            what = re.search(r"race|bounds|misaligned|endless|waits|read-only|mask|no address", str(fault))
            return f"caught by {case.__name__}: {what[0] if what else 'fault'}"
        except NotImplementedError as error:
            return f"not run: {error}"
    return "same code" if same else "survived"


def sampled(mutant: Mutant, part: int, parts: int) -> bool:
    """Whether a mutant is in one of the parts into which all fall by chance, the same at every run."""
    digest = hashlib.sha256("\0".join(map(str, mutant)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % parts == part


def survivors() -> dict[str, str]:
    """Those known, each with the reason."""
    return dict(_known()["survivors"])


def judged() -> int:
    """How many mutants compiled to other code when all were judged."""
    return int(_known()["judged"])


def _known() -> dict[str, Any]:
    return dict(json.loads(SURVIVORS.read_text(encoding="utf-8")))


def _read_texts() -> None:
    """All of them at once: a text that is edited meanwhile does not count."""
    from tests.mutation import cases

    for file in FILES:
        cases.text(file)


def main(arguments: list[str] | None = None) -> int:
    """Judge mutants, print what survives; 1 if that is not what is known."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=FILES, help="mutants of one file")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write every mutant and its fate as JSON")
    options = parser.parse_args(arguments)
    chosen = [mutant for file in FILES if options.only in (None, file) for mutant in mutants(file)]
    with ProcessPoolExecutor(options.processes, get_context("spawn"), initializer=_read_texts) as pool:
        fates = list(pool.map(judge, chosen, chunksize=4))
    texts = {file: (FOLDER / file).read_text(encoding="utf-8") for file in FILES}
    table = {mutant.key(texts[mutant.file]): fate for mutant, fate in zip(chosen, fates)}
    if options.write:
        options.write.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    known = {key for key in survivors() if options.only in (None, key.partition(":")[0])}
    found = {key for key, fate in table.items() if fate == "survived" or fate.startswith("not run")}
    for file in FILES:
        counts = Counter(fate.partition(" ")[0] for mutant, fate in zip(chosen, fates) if mutant.file == file)
        print(f"{file:12} {dict(sorted(counts.items()))}")
    for title, keys in (("survived, not known", found - known), ("known, but caught", known - found)):
        print(f"\n{title}: {len(keys)}", *sorted(keys), sep="\n  ")
    return int(found != known)


if __name__ == "__main__":
    sys.exit(main())
