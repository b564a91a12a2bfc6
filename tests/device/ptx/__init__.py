"""Runs the PTX that NVRTC makes on NumPy, one lane per thread, and checks every access.

What it refuses with a Fault: accesses out of bounds, misaligned, or to read-only buffers; arguments of the wrong size;
data races within a warp, a block and between blocks; threads that miss a barrier or a warp's synchronisation;
integer division by zero; loops without an end. Shared and local memory start as NaN. An instruction that it does not
know raises NotImplementedError when the kernel is first launched.

What it does not see: the memory model of the hardware beyond these races, and fences, with which blocks could be
ordered; approximate instructions; time.
"""

from tests.device.ptx.fault import Fault
from tests.device.ptx.launch import run
from tests.device.ptx.memory import Memory
from tests.device.ptx.text import Kernel, Module

__all__ = ["Fault", "Kernel", "Memory", "Module", "run"]
