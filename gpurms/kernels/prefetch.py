"""Rows asked for before they are needed: in a large table each is a wait for memory that hardware cannot foresee."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpurms.kernels.jit import inline

CACHE_LINE = 64  # bytes


@intrinsic
def _prefetch(context, table, row, column):
    """Bring the cache line of ``table[row, column]`` near; no bounds check, no effect on values."""

    def generate(context, builder, signature, args):
        kind = signature.args[0]
        array = context.make_array(kind)(context, builder, args[0])
        item = cgutils.get_item_pointer(context, builder, kind, array, args[1:], wraparound=False)
        byte = builder.bitcast(item, ir.IntType(8).as_pointer())
        int32 = ir.IntType(32)
        form = ir.FunctionType(ir.VoidType(), [byte.type, int32, int32, int32])
        function = builder.module.declare_intrinsic("llvm.prefetch", (byte.type,), form)
        to_read, keep, data = (ir.Constant(int32, value) for value in (0, 3, 1))
        builder.call(function, [byte, to_read, keep, data])
        return context.get_dummy_value()

    return types.void(table, types.intp, types.intp), generate


@inline
def prefetch_row(table, row, left, right):
    """Ask for columns [left, right) of a row of a contiguous 2-D array."""
    for column in range(left, right, CACHE_LINE // table.itemsize):
        _prefetch(table, row, column)  # type: ignore[call-arg]  # Numba passes the context
