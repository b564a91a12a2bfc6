"""What autograd lacks to record CuPy arrays and bfloat16. Imported with the first tape.

Operations on CuPy arrays reach CuPy through NumPy's dispatch protocols, and so do most of autograd's gradients. For the
rest ``cupy_rules`` has rules, which the nodes of our tapes look up; autograd's own table is left as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Self

import numpy as np
from autograd import core, tracer
from autograd.numpy.numpy_boxes import ArrayBox
from autograd.numpy.numpy_vspaces import ArrayVSpace

from gpurms import backend
from gpurms.kernels.pool import fork_safe_lock

_opening = fork_safe_lock()


class Node:
    """An operation in a tape: the nodes of its arguments, and the function from its gradient to theirs."""

    __slots__ = ("parents", "vjp")

    def __init__(
        self,
        value: Any,
        function: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        argnums: Sequence[int],
        parents: Sequence[Node],
    ) -> None:
        self.parents = parents
        rules = _cupy_rules() if is_cupy(tracer.getval(value)) else {}
        maker = rules.get(function) or core.primitive_vjps.get(function)
        if maker is None:
            raise NotImplementedError(f"autograd has no gradient of {getattr(function, '__name__', function)}")
        self.vjp: Callable[[Any], Any] = maker(argnums, value, args, kwargs)

    @classmethod
    def root(cls) -> Self:
        """The node of something that is not computed from anything else."""
        node = cls.__new__(cls)
        node.parents, node.vjp = (), lambda grad: ()
        return node


tracer.notrace_primitives[Node] = tracer.notrace_primitives[core.VJPNode]


def new_trace() -> int:
    """A trace number above all open ones.

    autograd counts open traces in one global, up and down, which two threads would confuse. Tapes only ever count it
    up, under a lock; numbers need not be dense, only larger for inner traces.
    """
    ml_dtypes = sys.modules.get("ml_dtypes")
    if ml_dtypes is not None and ml_dtypes.bfloat16 not in tracer.box_type_mappings:
        ArrayBox.register(ml_dtypes.bfloat16)  # scalars, which operations on 0-d arrays return
        ArrayVSpace.register(ml_dtypes.bfloat16)
    with _opening:
        tracer.trace_stack.top += 1
        return int(tracer.trace_stack.top)


def new_root(value: Any, trace: int) -> tuple[Node, Any]:
    """A node, and the box around ``value`` by which operations on it are recorded."""
    if is_cupy(value):
        _cupy_rules()
    node = Node.root()
    return node, tracer.new_box(value, trace, node)


def is_cupy(value: Any) -> bool:
    """Whether a value is a CuPy array."""
    home = backend.of(value)
    return home is not None and home.name == "CuPy"


def module_of(value: Any) -> ModuleType:
    """NumPy, or CuPy for its arrays."""
    return sys.modules["cupy"] if is_cupy(value) else np


def _cupy_rules() -> Mapping[Any, Any]:
    from gpurms import cupy_rules

    return cupy_rules.RULES
