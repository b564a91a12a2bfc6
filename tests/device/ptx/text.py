"""From PTX text to kernels: parameters, variables, and statements whose registers and labels are resolved."""

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TYPES = {
    "pred": np.dtype(np.bool_),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    # NumPy has no such types: their bits.
    "bf16": np.dtype(np.uint16),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
}
TYPES |= {f"{kind}{8 * size}": np.dtype(f"u{size}") for kind in "bu" for size in (1, 2, 4, 8)}
TYPES |= {f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)}

# [linkage] .space [.align n] .type name [ [count] ] [ = initial values ]
_VARIABLE = re.compile(
    r"(?P<linkage>(?:\.(?:visible|extern|weak|common)\s+)*)\.(?P<space>const|global|shared|local|param)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?:\.ptr\s+(?:\.\w+\s+(?:\d+\s+)?)*)?"
    r"(?P<name>[\w$]+)(?P<array>\[(?P<count>\d*)\])?(?:\s*=\s*(?P<initial>.*))?$",
    re.DOTALL,
)
_FUNCTION = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.(?P<kind>entry|func)\b(?P<head>[^{;]*)(?P<end>[{;])")
_SPACE = re.compile(r"\s*")
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_STATEMENT = re.compile(
    r"(?:@(?P<negate>!?)(?P<predicate>[\w%$]+)\s+)?(?P<opcode>[\w.:]+)\s*(?P<operands>.*)", re.DOTALL
)
_OPERAND = re.compile(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,]+?)\s*(?:,|$)")


@dataclass(frozen=True)
class Register:
    """One register of a kernel; the numbers count the registers of one width."""

    number: int
    width: int  # bytes; 0 is a predicate


@dataclass(frozen=True)
class Variable:
    """A parameter, or an array in shared, local, constant or global memory."""

    name: str
    space: str
    align: int
    nbytes: int
    initial: bytes = b""


@dataclass
class Scope:
    """The names of one pair of braces: inline assembly declares registers and labels of its own."""

    outer: "Scope | None" = None
    registers: dict[str, Register] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)

    def register(self, name: str) -> Register | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.registers:
                return scope.registers[name]
            scope = scope.outer
        return None

    def label(self, name: str) -> int:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.outer
        raise ValueError(f"no label {name}")


@dataclass(frozen=True)
class Statement:
    """One instruction as written."""

    text: str
    opcode: str
    operands: tuple[str, ...]
    predicate: str
    negate: bool
    scope: Scope


@dataclass
class Kernel:
    """One entry of a module."""

    name: str
    parameters: list[Variable]
    max_threads: int
    variables: list[Variable]  # shared and local, dynamic shared memory with 0 bytes
    statements: list[Statement]
    register_counts: dict[int, int]  # width -> how many
    module: "Module"
    program: Any = None  # what the first launch decodes


class Module:
    """All kernels of one PTX text, with the module's constant and global variables."""

    def __init__(self, ptx: bytes) -> None:
        text = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", "", ptx.decode().rstrip("\0"), flags=re.MULTILINE)
        outside, functions = _split(text)
        declared = [v for v in map(_variable, outside.split(";")) if v is not None]
        self.variables = [v for v in declared if v.space in ("const", "global")]
        shared = [v for v in declared if v.space == "shared"]
        self.storage = {v.name: _storage(v) for v in self.variables}
        self.kernels = {k.name: k for k in (_kernel(self, head, body, shared) for head, body in functions)}


def _split(text: str) -> tuple[str, list[tuple[str, str]]]:
    """What stands outside of functions, and head and body of each kernel."""
    outside, kernels, position = [], [], 0
    for match in _FUNCTION.finditer(text):
        outside.append(text[position : match.start()])
        position = match.end()
        if match["end"] == ";":
            continue
        depth = 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            position += 1
        if match["kind"] == "entry":
            kernels.append((match["head"], text[match.end() : position - 1]))
    return "".join((*outside, text[position:])), kernels


def _variable(text: str) -> Variable | None:
    match = _VARIABLE.search(text.strip())
    if match is None:
        return None
    dtype = TYPES[match["type"]]
    count = int(match["count"] or 0) if match["array"] else 1
    return Variable(
        match["name"],
        match["space"],
        int(match["align"] or dtype.itemsize),
        count * dtype.itemsize,
        _initial(match["initial"], dtype),
    )


def _initial(text: str | None, dtype: np.dtype[Any]) -> bytes:
    if not text:
        return b""
    values = [immediate(v.strip(), dtype) for v in text.strip().strip("{}").split(",")]
    return np.concatenate(values).tobytes()


def _storage(variable: Variable) -> np.ndarray:
    """Memory of the host for a variable of the module, aligned as declared."""
    raw = np.zeros(variable.nbytes + variable.align, np.uint8)
    start = -raw.ctypes.data % variable.align
    raw[start : start + len(variable.initial)] = np.frombuffer(variable.initial, np.uint8)
    return raw[start : start + variable.nbytes]


def _kernel(module: Module, head: str, body: str, shared: list[Variable]) -> Kernel:
    name, parameters, directives = re.fullmatch(r"\s*([\w$]+)\s*(?:\((.*?)\))?(.*)", head, re.DOTALL).groups()
    limit = re.search(r"\.(?:maxntid|reqntid)\s+([\d, ]+)", directives)
    kernel = Kernel(
        name,
        [v for v in map(_variable, (parameters or "").split(",")) if v is not None],
        int(np.prod([int(n) for n in limit[1].split(",")])) if limit else 1024,
        [v for v in shared if re.search(rf"(?<![\w$]){re.escape(v.name)}(?![\w$])", body)],
        [],
        {0: 0, 1: 0, 2: 0, 4: 0, 8: 0},
        module,
    )
    _parse_body(kernel, body)
    return kernel


def _parse_body(kernel: Kernel, body: str) -> None:
    scope, position = Scope(), 0
    while True:
        position = _SPACE.match(body, position).end()
        if position == len(body):
            return
        if body[position] in "{}":
            scope = Scope(scope) if body[position] == "{" else scope.outer
            position += 1
        elif match := _LABEL.match(body, position):
            scope.labels[match[1]] = len(kernel.statements)
            position = match.end()
        else:
            end = body.index(";", position)
            _parse_statement(kernel, scope, " ".join(body[position:end].split()))
            position = end + 1


def _parse_statement(kernel: Kernel, scope: Scope, text: str) -> None:
    if text.startswith(".reg"):
        _declare_registers(kernel, scope, text)
    elif text.startswith("."):
        variable = _variable(text)
        if variable is not None and variable.space in ("shared", "local"):
            kernel.variables.append(variable)
    elif text:
        match = _STATEMENT.fullmatch(text)
        operands = tuple(_OPERAND.findall(match["operands"])) if match["operands"] else ()
        kernel.statements.append(
            Statement(text, match["opcode"], operands, match["predicate"] or "", match["negate"] == "!", scope)
        )


def _declare_registers(kernel: Kernel, scope: Scope, text: str) -> None:
    _, kind, names = text.split(None, 2)
    width = 0 if kind == ".pred" else TYPES[kind[1:]].itemsize
    for name in names.split(","):
        family = re.fullmatch(r"\s*([\w%$]+)(?:<(\d+)>)?\s*", name)
        members = [f"{family[1]}{i}" for i in range(int(family[2]))] if family[2] else [family[1]]
        for member in members:
            scope.registers[member] = Register(kernel.register_counts[width], width)
            kernel.register_counts[width] += 1


def immediate(text: str, dtype: np.dtype[Any]) -> np.ndarray:
    """A literal as an array of one element, so that it meets registers like any other operand."""
    if match := re.fullmatch(r"0(?:[fF]([0-9a-fA-F]{8})|[dD]([0-9a-fA-F]{16}))", text):
        size = 4 if match[1] else 8
        bits = np.array([int(text[2:], 16)], f"u{size}")
        return bits.view(f"f{size}").astype(dtype) if dtype.kind == "f" else bits.astype(dtype)
    value = int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return np.array([value != 0])
    if dtype.kind == "f":
        return np.array([value], dtype)
    return np.array([value & ((1 << 8 * dtype.itemsize) - 1)], f"u{dtype.itemsize}").view(dtype)
