"""NVRTC is called as CuPy calls it."""

import pytest

from tests.ptx_support import find_nvrtc


def test_nvrtc_reports_errors() -> None:
    nvrtc = find_nvrtc()
    from cupy.cuda.compiler import CompileException

    with pytest.raises(CompileException, match='identifier "missing" is undefined'):
        nvrtc.compile("__global__ void k() { missing(); }")
    with pytest.raises(ValueError, match="kind must be 'ptx' or 'cubin', got 'sass'"):
        nvrtc.compile("", kind="sass")


@pytest.mark.parametrize("arch", ["75", "80", "90", "100", "120"])
def test_nvrtc_compiles_for_every_architecture(arch: str) -> None:
    source = 'extern "C" __global__ void k(float* x) { x[threadIdx.x] *= 2; }'
    assert f".target sm_{arch}".encode() in find_nvrtc().compile(source, arch=arch)
    assert find_nvrtc().compile(source, arch=arch, kind="cubin").startswith(b"\x7fELF")
