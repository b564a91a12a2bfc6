"""Gradients of NumPy-style code, by HIPS/autograd: ``GradientTape`` and the embedding lookup ``gather``.

autograd is imported when the first tape is made. It records operations on boxes around arrays; here, a variable that
is read inside a tape becomes a box, and so do the rows that ``gather`` reads, which is why their gradient is sparse
without any rule for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from gpurms import backend
from gpurms.slots import array_of, label
from gpurms.variable import Array, IndexedSlices, Variable, recording


class _Gathered(NamedTuple):
    """Rows read by one ``gather``: their indices, flat, and the node at which their gradient ends up."""

    indices: Array
    node: Any


class GradientTape:
    """Records what is computed from ``variable.value`` and ``gather(variable, indices)`` in its ``with`` block.

    The computation uses ``autograd.numpy`` (or operators and methods). Tapes may be nested, the outer one then
    differentiates the gradients of the inner one; each thread has its own. Ask for gradients before the variables are
    updated: the tape refers to their arrays.

    Values of variables on a GPU are CuPy arrays, and so must the constants be that they meet. Work goes to the current
    device, gradients to the device of the target. Without a gradient on a GPU are ``sort``, ``trace`` and what CuPy
    lacks. The gradient of indexing by an array sums repeated places in any order there; that of ``gather`` does not.

    >>> from gpurms import Variable
    >>> v = Variable([1.0, 2.0])
    >>> with GradientTape() as tape:
    ...     loss = (v.value**2).sum()
    >>> tape.gradient(loss, v)
    array([2., 4.], dtype=float32)
    """

    def __init__(self) -> None:
        self._trace: int | None = None
        self._read_nodes: dict[Any, Any] = {}
        self._boxes: dict[Any, Any] = {}
        self._gathered: dict[Any, list[_Gathered]] = {}

    def __enter__(self) -> Self:
        if self._trace is not None:
            raise RuntimeError("a GradientTape records one `with` block; make a new one")
        from gpurms import tracing

        self._trace = tracing.new_trace()
        recording.tapes.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        recording.tapes.remove(self)

    def gradient(self, target: Any, sources: Any, output_gradients: Any = None) -> Any:
        """Gradients of ``target`` with respect to ``sources``.

        Args:
            target: a value computed in the ``with`` block. A non-scalar stands for the sum of its elements.
            sources: a variable, or a list or tuple of variables.
            output_gradients: array of the target's shape by which its elements are weighted.

        Returns:
            One entry per source, a single one for a single source, in the variable's dtype: an array; an
            ``IndexedSlices`` if the variable was read only through ``gather`` (several calls are concatenated); None if
            the target does not depend on it.

        Raises:
            TypeError: a source is no variable.
            ValueError: output_gradients has another shape than the target.
        """
        if self._trace is None:
            raise RuntimeError("the GradientTape has recorded nothing: use it in a `with` statement first")
        single = not isinstance(sources, list | tuple)
        wanted = [sources] if single else list(sources)
        for source in wanted:
            if not is_variable(source):
                raise TypeError(f"sources must be variables; got {source!r:.80}")
        if output_gradients is not None and np.shape(output_gradients) != np.shape(target):
            raise ValueError(
                f"output_gradients must have the target's shape {np.shape(target)}; got {np.shape(output_gradients)}"
            )
        found = self._backward(target, output_gradients)
        grads = [self._gradient_of(source, found) for source in wanted]
        return grads[0] if single else grads

    def _read(self, variable: Variable, value: Any) -> Any:
        """The box of a variable in this tape, around ``value``, which an outer tape may have boxed already."""
        key = _key(variable)
        if key not in self._boxes:
            self._read_nodes[key], self._boxes[key] = self._root(value)
        return self._boxes[key]

    def _gather(self, variable: Any, indices: Array, rows: Any) -> Any:
        node, box = self._root(rows)
        self._gathered.setdefault(_key(variable), []).append(_Gathered(indices.reshape(-1), node))
        return box

    def _root(self, value: Any) -> tuple[Any, Any]:
        from gpurms import tracing

        assert self._trace is not None
        return tracing.new_root(value, self._trace)

    def _backward(self, target: Any, output_gradients: Any) -> dict[Any, Any]:
        """Gradients by node, for the nodes at which variables and rows were read."""
        from autograd import core, tracer

        from gpurms import tracing

        if not tracer.isbox(target) or target._trace != self._trace:
            return {}
        value = tracer.getval(target)
        space = core.vspace(value)
        with _near(value):
            if output_gradients is None:
                start = space.ones()
            else:
                start = tracing.module_of(value).asarray(output_gradients, dtype=space.dtype)
            pending = {target._node: (start, False)}
            roots = {}
            for node in tracer.toposort(target._node):
                grad = pending.pop(node)
                if not node.parents:
                    roots[node] = grad[0]
                for parent, part in zip(node.parents, node.vjp(grad[0])):
                    pending[parent] = core.add_outgrads(pending.get(parent), part)
            return roots

    def _gradient_of(self, source: Any, found: dict[Any, Any]) -> Any:
        import autograd.numpy as anp

        key, array = _key(source), array_of(source)
        gathered = [each for each in self._gathered.get(key, ()) if each.node in found]
        node = self._read_nodes.get(key)
        with _near(array):
            dense = None if node not in found else _cast(found[node], array)
            if not gathered:
                return dense
            row_shape = array.shape[1:]
            values = anp.concatenate([anp.reshape(found[each.node], (-1, *row_shape)) for each in gathered])
            indices = np.concatenate([each.indices for each in gathered])
            rows = IndexedSlices(_cast(values, array), indices, array.shape)
        return rows if dense is None else backend.require(array).add_rows(dense, rows.indices, rows.values)


def gather(variable: Any, indices: Any) -> Any:
    """Rows of a variable: ``variable[indices]`` for integer indices of any shape, with a sparse gradient in a tape.

    Raises:
        TypeError: indices are not integers.
        ValueError: a 0-d variable.
        IndexError: an index is negative or beyond the last row.

    >>> import numpy as np
    >>> from gpurms import Variable
    >>> table = Variable(np.arange(6.0).reshape(3, 2))
    >>> with GradientTape() as tape:
    ...     loss = (gather(table, [2, 0]) ** 2).sum()
    >>> grad = tape.gradient(loss, table)
    >>> grad.values.tolist(), grad.indices.tolist()
    ([[8.0, 10.0], [0.0, 2.0]], [2, 0])
    """
    if not is_variable(variable):
        raise TypeError(f"gather needs a variable; got {variable!r:.80}")
    array = array_of(variable)
    home = backend.require(array)
    at = home.indices(array, array_of(indices))
    if not array.shape:
        raise ValueError(f"{label(variable)} is 0-d and has no rows")
    outside = home.first_outside([(at.reshape(-1), array.shape[0])])
    if outside is not None:
        offset = outside[1]
        raise IndexError(
            f"{label(variable)}: index {int(at.reshape(-1)[offset])} at offset {offset} is outside "
            f"[0, {array.shape[0]})"
        )
    with home.near(array):
        rows = home.view(array)[at]
    for tape in recording.tapes:
        rows = tape._gather(variable, at, rows)
    return rows


def differentiate(loss: Callable[[], Any], var_list: Any, grad_loss: Any) -> tuple[list[Any], list[Any]]:
    """Gradients of ``loss()`` and the flat list of variables; see ``RMSprop.minimize``."""
    if not callable(loss):
        raise TypeError(f"loss must be a zero-argument callable; got {loss!r:.80}")
    outer, recording.tapes = recording.tapes, []  # an outer tape must not turn the gradients into traced values
    try:
        with GradientTape() as tape:
            value = loss()
        variables = flatten(var_list() if callable(var_list) else var_list)
        return tape.gradient(value, variables, grad_loss), variables
    finally:
        recording.tapes = outer


def flatten(var_list: Any) -> list[Any]:
    """The variables in a nested list or tuple.

    Raises:
        ValueError: it holds something that is not a variable.
    """
    if isinstance(var_list, list | tuple):
        return [variable for part in var_list for variable in flatten(part)]
    if not is_variable(var_list):
        raise ValueError(f"expected a variable or a nested list of variables; got {var_list!r:.80}")
    return [var_list]


def is_variable(thing: Any) -> bool:
    """A ``Variable`` or an array of a supported library."""
    return isinstance(thing, Variable) or backend.of(thing) is not None


def _key(variable: Any) -> Any:
    array = array_of(variable)
    return backend.require(array).key(array)


def _near(value: Any) -> AbstractContextManager[Any]:
    home = backend.of(value)
    return nullcontext() if home is None else home.near(value)


def _cast(grad: Any, array: Array) -> Any:
    """The gradient as an array of the variable's type; 0-d results arrive as scalars."""
    if isinstance(grad, np.generic | float):
        return np.asarray(grad, dtype=array.dtype)
    if grad.dtype != array.dtype:
        return grad.astype(array.dtype)
    repeated = 0 in getattr(grad, "strides", ())  # elements that share memory cannot be scaled in place
    return grad.copy() if repeated else grad
