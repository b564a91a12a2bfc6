"""NVRTC compiles everything that the library can ask for, and the machine code is what the kernels are designed for."""

import os
import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

cuda_programs = pytest.importorskip("tests.cuda_programs", reason="CuPy and NVRTC compile the kernels")

from tests.cuda_programs import Program, covering  # noqa: E402
from tests.device import nvrtc  # noqa: E402

KINDS = ("multi", "rows", "norm", "strided")
ARCHITECTURES = ("75", "80", "90", "100", "120")
SIZES = {"float16_t": 2, "bfloat16_t": 2, "float": 4, "double": 8}


@cache
def programs(kind: str) -> list[Program]:
    return cuda_programs.programs(kind)


def macros(program: Program) -> dict[str, str]:
    return dict(re.findall(r"#define (\w+) (.*)", program.source))


def some(kind: str, arch: str) -> list[Program]:
    """A part of the programs, another one for each architecture; more for the one that is looked at closely."""
    steps = {"multi": 4, "rows": 6, "norm": 3, "strided": 9} if arch == "90" else dict.fromkeys(KINDS, 13)
    return programs(kind)[ARCHITECTURES.index(arch) :: steps[kind]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_program_compiles(kind: str) -> None:
    """No multiplication is contracted with an addition: each rounds by itself, as on the CPU."""
    for program in programs(kind):
        ptx = nvrtc.compile(program.source, program.options)
        assert not re.search(rb"\bfma\.", ptx), program.case


def test_the_cases_cover_every_pair() -> None:
    factors = {"a": [1, 2, 3], "b": [False, True], "c": ["x", "y"], "d": [0, 1]}
    rows = covering(factors)
    met = {(name, row[name], other, row[other]) for row in rows for name in factors for other in factors}
    for name, values in factors.items():
        for other in factors.keys() - {name}:
            assert {(name, i, other, j) for i in values for j in factors[other]} <= met
    assert len(rows) < 10  # of 24


def test_the_cases_have_every_kernel_type_and_flag() -> None:
    seen: dict[str, set[str]] = {}
    for kind in KINDS:
        for program in programs(kind):
            for name, value in macros(program).items():
                seen.setdefault(name, set()).add(value)
    types = set(SIZES)
    assert [seen[name] for name in ("var_t", "grad_t", "rms_t", "mom_t", "mg_t")] == [types] * 5
    assert seen["compute_t"] == {"float", "double"}
    flags = [name.upper() for name in cuda_programs.Flags._fields]
    assert [seen[name] for name in (*flags, "PACKED", "ADD_ROWS")] == [{"0", "1"}] * (len(flags) + 2)
    assert seen["DIMS"] == {"0", "1", "2"}
    assert seen["key_t"] == {"unsigned int", "unsigned long long"}
    assert seen["id_t"] == {"int", "long long"}


# --------------------------------------------------------------------------------------------------- machine code

# Registers that a thread may take. A multiprocessor has 65,536 of them for up to 2,048 threads (1,024 on sm_75 and
# 1,536 on sm_120), so 32 fill it. The kernels wait for memory: what counts is bytes in flight, of which an H200 needs
# about 30 KiB per multiprocessor (4.8 TB/s for 0.8 us, over 132 of them).
REGISTERS = {
    "multi": 128,  # 2 blocks of 256 threads, each with 48 to 128 bytes of reads in flight
    "update_rows": 255,  # 2 blocks of 128 threads
    "combine_sums": 255,
    "sort_tile": 255,  # one block in all
    "scatter_items": 168,  # 1 block of 256 threads with 16 items each
    "count_digits": 40,  # 6 blocks of 256 threads
    "sum_counts": 40,
    "find_outside": 32,
    "square_sums": 64,  # 4 blocks of 256 threads, each with 4 sums at work
    "fold": 64,
    "clip_factors": 255,  # one block in all
    "set_scalars": 255,  # one thread in all
    "rmsprop": 64,  # CuPy's loop: 8 blocks of 128 threads
}
FLOAT32_REGISTERS = {
    "multi": 40,  # 6 blocks of 256 threads
    "update_rows": 128,  # 4 blocks of 128 threads
    "combine_sums": 128,
}
SHARED_BYTES = {
    "update_rows": 2048,
    "combine_sums": 2048,
    "sort_tile": 8224,
    "scatter_items": 8224,
    "count_digits": 1024,
    "sum_counts": 32,
    "square_sums": 8192,
    "fold": 8192,
    "clip_factors": 2056,
}


def all_float32(program: Program) -> bool:
    types = {value for name, value in macros(program).items() if name.endswith("_t") and value in SIZES}
    return types == {"float"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_registers_and_no_local_memory(kind: str, arch: str) -> None:
    for program in some(kind, arch):
        _, kernels = nvrtc.machine_code(program.source, program.options, arch)
        assert kernels
        for name, resources in kernels.items():
            where = f"{name} for sm_{arch}: {program.case}"
            assert (resources.stack, resources.spills) == (0, 0), where
            limits = REGISTERS | FLOAT32_REGISTERS if all_float32(program) else REGISTERS
            assert resources.registers <= limits[name], where
            assert resources.shared == SHARED_BYTES.get(name, 0), where


def disassembler() -> Path:
    """The folder of cuobjdump and nvdisasm."""
    nvidia = pytest.importorskip("nvidia", reason="cuobjdump comes from PyPI: nvidia-cuda-cuobjdump")
    for folder in nvidia.__path__:
        for tools in Path(folder).glob("cu*/bin"):
            if (tools / "cuobjdump").exists() and (tools / "nvdisasm").exists():
                return tools
    pytest.skip("nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm are not installed")


def instructions(cubin: bytes) -> dict[str, Counter[str]]:
    """How often each kernel has each instruction."""
    tools = disassembler()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
        command = [tools / "cuobjdump", "-sass", file]
        text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    kernels = {}
    for part in text.split("Function : ")[1:]:
        name, _, code = part.partition("\n")
        found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", code)
        kernels[name.strip()] = Counter(found)
    return kernels


def total(counts: Counter[str], *prefixes: str) -> int:
    return sum(number for opcode, number in counts.items() if opcode.startswith(prefixes))


def packets(program: Program, *types: str) -> int:
    """Accesses of 16 bytes that a thread needs for its elements of arrays of these types."""
    names = macros(program)
    return sum(int(names["VECTOR"]) * SIZES[names[name]] // 16 for name in types)


def slots(program: Program) -> list[str]:
    names = macros(program)
    return ["rms_t"] + ["mom_t"] * int(names["HAS_MOMENTUM"]) + ["mg_t"] * int(names["CENTERED"])


FLOAT64_ARITHMETIC = ("DADD", "DMUL", "DFMA", "DSETP", "MUFU.RCP64H", "MUFU.RSQ64H", "F2F.F64", "F2F.F32.F64")


@pytest.mark.parametrize("arch", ["75", "90"])
def test_dense_variables_move_16_bytes_at_a_time(arch: str) -> None:
    """Exactly as many wide accesses as arrays need: none is split, none is done twice."""
    for program in some("multi", arch):
        cubin, _ = nvrtc.machine_code(program.source, program.options, arch)
        counts = instructions(cubin)["multi"]
        written = ["var_t", *slots(program)]
        assert total(counts, "LDG.E.128") == packets(program, "grad_t", *written), program.case
        assert total(counts, "STG.E.128") == packets(program, *written), program.case
        assert total(counts, "LDL", "STL") == 0, program.case
        types = {macros(program)[name] for name in ("compute_t", "var_t", "grad_t", *slots(program))}
        if "double" not in types:
            assert total(counts, *FLOAT64_ARITHMETIC) == 0, program.case


def test_rows_move_16_bytes_at_a_time() -> None:
    """The loop over values may be unrolled, so their loads count by the turn; everything else is exact."""
    for program in some("rows", "90"):
        names = macros(program)
        if "PACKED" not in names:
            continue
        cubin, _ = nvrtc.machine_code(program.source, program.options, "90")
        written = ["var_t"] if names["ADD_ROWS"] == "1" else ["var_t", *slots(program)]
        for name, values in (("update_rows", "grad_t"), ("combine_sums", "compute_t")):
            counts = instructions(cubin)[name]
            wide = total(counts, "LDG.E.128"), total(counts, "STG.E.128")
            if names["PACKED"] == "0":
                assert wide == (0, 0), program.case
            else:
                of_values = wide[0] - packets(program, *written)
                assert of_values > 0, program.case
                assert of_values % packets(program, values) == 0, program.case
                assert wide[1] == packets(program, *written, "compute_t"), program.case


def test_a_planted_spill_is_seen() -> None:
    """The checks above read the assembler's own report."""
    body = "float x[64] = {}; for (int i = 0; i < n; i++) x[(int)y[i] & 63] += 1; y[n] = x[n & 63];"
    source = f'extern "C" __global__ void planted(float* y, int n) {{ {body} }}'
    assert nvrtc.machine_code(source, (), "90")[1]["planted"].stack == 256
    fused = 'extern "C" __global__ void planted(float* y) { *y = *y * *y + 1; }'
    assert re.search(rb"\bfma\.", nvrtc.compile(fused))
