"""What an optimizer keeps from step to step: the counter, the slots, the weights that are both of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gpurms import backend, hyper
from gpurms.aliasing import Pair
from gpurms.backend import Backend
from gpurms.capture import Capture
from gpurms.counter import Counter
from gpurms.slots import Entry, Slots, array_of, label
from gpurms.variable import Variable

if TYPE_CHECKING:
    from gpurms.rmsprop import RMSprop

MADE_ANEW = ("_batches", "_capture", "_repeat")
"""What copies and pickles leave behind: it refers to arrays by their addresses."""


class State:
    """The members of ``RMSprop`` that read and write its state; copies and pickles take it along."""

    __slots__ = ("__weakref__", "_batches", "_capture", "_counter", "_repeat", "_settings", "_slots")

    name: Any
    slot_dtype: Any
    capturable: Any

    def __init__(self) -> None:
        self._settings: dict[str, Any] = {}
        self._slots = Slots()
        self._counter: Counter | None = None
        self._batches: tuple[list[Entry], list[tuple[Backend, list[int]]]] = ([], [])
        self._capture = Capture()
        self._repeat: Any = None  # the call before, see repeat.py

    @property
    def iterations(self) -> Variable:
        """The counter of steps: a 0-d int64 ``Variable``, made at the first access or step.

        May be set to a ``Variable`` of the caller's before it exists, which is then counted up; RuntimeError later.

        >>> from gpurms import RMSprop
        >>> opt = RMSprop()
        >>> opt.iterations.assign(100).numpy()
        array(100)
        """
        if self._counter is None:
            self._set_counter(self._new_counter())
        assert self._counter is not None
        return self._counter.variable

    @iterations.setter
    def iterations(self, variable: Variable) -> None:
        if self._counter is not None:
            raise RuntimeError(
                "Cannot set `iterations` to a new Variable after the Optimizer weights have been created; "
                "use `iterations.assign`"
            )
        if not isinstance(variable, Variable) or variable.shape != () or variable.dtype != np.int64:
            raise TypeError(f"iterations must be a 0-d int64 Variable; got {variable!r}")
        self._set_counter(Counter(variable))

    @property
    def weights(self) -> list[Variable]:
        """The live list of the counter and all slots; empty until the counter exists.

        After the counter, for each call that met new variables: ``rms`` of each of them, ``momentum`` of each, ``mg``
        of each, as far as they are in use.

        >>> from gpurms import RMSprop
        >>> opt = RMSprop(momentum=0.9)
        >>> opt.apply_gradients([(np.ones(2), np.zeros(2))])
        np.int64(1)
        >>> [weight.name for weight in opt.weights]
        ['iterations', 'RMSprop/array/rms', 'RMSprop/array/momentum']
        """
        return self._slots.weights

    def variables(self) -> list[Variable]:
        """The same list as ``weights``."""
        return self._slots.weights

    def get_weights(self) -> list[np.ndarray[Any, Any]]:
        """Copies of all ``weights`` in host memory; the first is the counter.

        >>> from gpurms import RMSprop
        >>> opt = RMSprop()
        >>> opt.apply_gradients([(np.ones(2), np.zeros(2))])
        np.int64(1)
        >>> [weight.tolist() for weight in opt.get_weights()]
        [1, [0.09999999999999998, 0.09999999999999998]]
        """
        return [weight.numpy() for weight in self.weights]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Write what ``get_weights`` returned, or the same without the counter, which then becomes 0.

        Raises:
            TypeError: weights is not a list or tuple, or an entry does not convert.
            ValueError: another number of entries, or another shape of one; nothing has been changed then.

        >>> from gpurms import RMSprop
        >>> opt, var = RMSprop(), np.zeros(2)
        >>> slot = opt.add_slot(var, "rms")
        >>> counter = opt.iterations
        >>> opt.set_weights([7, [0.5, 0.25]])
        >>> counter.numpy(), slot.numpy()
        (array(7), array([0.5 , 0.25]))
        """
        if not isinstance(weights, list | tuple):
            raise TypeError(f"weights must be a list or tuple of arrays; got {type(weights).__name__}")
        own = self.weights
        values = [0, *weights] if own and len(weights) == len(own) - 1 else list(weights)
        if len(values) != len(own):
            raise ValueError(
                f"set_weights of optimizer {self.name!r} got {len(weights)} weights, but the optimizer was expecting "
                f"{len(own)} weights; slots exist after the first step or `add_slot`"
            )
        converted = []
        for weight, value in zip(own, values):
            home = backend.require(weight._array)
            if not home.writeable([weight._array]):
                raise TypeError(f"{weight.name}: expected to write to it; it is read-only")
            value = home.numbers(array_of(value), weight.name)
            if np.shape(value) != weight.shape:
                raise ValueError(
                    f"Optimizer weight shape {weight.shape} not compatible with provided weight shape "
                    f"{np.shape(value)} ({weight.name})"
                )
            converted.append(home.convert(weight._array, value, weight.name))
        for weight, new in zip(own, converted):
            weight._overwrite(new)

    def get_slot_names(self) -> list[str]:
        """Names of the slots in use, in order of first use: of ``rms``, ``momentum``, ``mg`` and the caller's own.

        >>> from gpurms import RMSprop
        >>> opt = RMSprop(momentum=0.9, centered=True)
        >>> opt.apply_gradients([(np.ones(2), np.zeros(2))])
        np.int64(1)
        >>> opt.get_slot_names()
        ['rms', 'momentum', 'mg']
        """
        return list(self._slots.names)

    def get_slot(self, var: Any, slot_name: str) -> Variable:
        """The slot of a variable.

        Raises:
            KeyError: the optimizer has not met the variable, or it has no slot of that name.

        >>> from gpurms import RMSprop
        >>> opt, var = RMSprop(rho=0.5), np.zeros(2)
        >>> opt.apply_gradients([(np.ones(2), var)])
        np.int64(1)
        >>> opt.get_slot(var, "rms").numpy()
        array([0.5, 0.5])
        """
        entry = self._slots.find(var)
        if entry is None:
            raise KeyError(f"{label(var)} has no slots: the optimizer has not updated it yet")
        if slot_name not in entry.slots:
            raise KeyError(f"{label(var)} has no slot {slot_name!r}; it has {list(entry.slots)}")
        return entry.slots[slot_name]

    def add_slot(self, var: Any, slot_name: str, initializer: Any = "zeros") -> Variable:
        """Make a slot of the variable's shape, or return the one it has.

        Args:
            var: the variable.
            slot_name: "rms", "momentum" and "mg" are the optimizer's; any other name is the caller's own.
            initializer: "zeros", "ones", a function of (shape, dtype), or a value of the variable's shape.

        Raises:
            TypeError, ValueError: no variable, or the initializer's value does not fit.

        >>> import numpy as np
        >>> from gpurms import RMSprop
        >>> opt, var = RMSprop(), np.zeros(2)
        >>> opt.add_slot(var, "rms", "ones").numpy()
        array([1., 1.])
        """
        hyper.text("slot_name", slot_name)
        entry = self._slots.find(var) or Entry(var, label(var))
        if slot_name in entry.slots:
            return entry.slots[slot_name]
        slot = self._new_slot(entry, slot_name)
        _initialize(slot, initializer)
        self._slots.adopt(entry)
        self._slots.add(entry, slot_name, slot)
        return slot

    def add_weight(
        self,
        name: str,
        shape: Sequence[int] | int,
        dtype: Any = None,
        initializer: Any = "zeros",
        trainable: bool | None = None,
        synchronization: Any = None,
        aggregation: Any = None,
    ) -> Variable:
        """Make a ``Variable`` of the caller's own; it is not among ``weights``.

        Args:
            name: its name.
            shape: its shape.
            dtype: its type; float32 by default.
            initializer: as in ``add_slot``.
            trainable: its mark; False by default.
            synchronization: must be None: there are no replicas to synchronise.
            aggregation: must be None, likewise.

        >>> from gpurms import RMSprop
        >>> RMSprop().add_weight("scale", (2,), initializer="ones").numpy()
        array([1., 1.], dtype=float32)
        """
        for option, value in (("synchronization", synchronization), ("aggregation", aggregation)):
            if value is not None:
                raise ValueError(f"{option} must be None, since variables have no replicas here; got {value!r}")
        array = backend.array_module().zeros(shape, np.float32 if dtype is None else dtype)
        weight = Variable(array, name=hyper.text("name", name), trainable=bool(trainable))
        _initialize(weight, initializer)
        return weight

    def save(self, path: str | os.PathLike[str], variables: Iterable[Any] | None = None) -> None:
        """Write variables, slots, counter and settings to one file in the safetensors format.

        The file is written under a temporary name in the same folder, synced to disk and then renamed: whatever fails,
        a file that was there stays whole. A process that is killed leaves its temporary file, ``.NAME.RANDOM.tmp``,
        which the next save to the same path removes, unless another process is writing it. Arrays are streamed,
        in blocks of 4 MiB where they are on a GPU or not contiguous. It waits for the current streams of the arrays'
        devices.

        Args:
            path: the file.
            variables: all variables that have slots, and any others, in the order in which ``load`` is to find them.
                Default None: those that have slots, in the order in which the optimizer met them.

        Not in the file: gradient_aggregator, constraints, and hyperparameters that are callables, in whose place their
        current values stand.

        Raises:
            OSError: the file cannot be written.
            TypeError: something that is no variable; a schedule whose ``get_config`` returns what JSON cannot hold.
            ValueError: a variable given twice, or one with slots left out.

        >>> import os, tempfile
        >>> from gpurms import RMSprop
        >>> opt, var = RMSprop(), np.zeros(2)
        >>> opt.apply_gradients([(np.ones(2), var)])
        np.int64(1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "step-1.safetensors")
        ...     opt.save(path, [var])
        ...     [again] = RMSprop().load(path)
        >>> (again == var).all()
        np.True_
        """
        from gpurms import checkpoint

        checkpoint.save(cast("RMSprop", self), path, variables)

    def load(
        self,
        path: str | os.PathLike[str],
        variables: Iterable[Any] | None = None,
        custom_objects: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Read what ``save`` wrote; the optimizer goes on as the saved one would have, to the bit, on any library.

        Variables are overwritten in place, and so are slots and counter where they exist and fit. All settings become
        those of the file. A hyperparameter that was a callable stays this optimizer's if it is one here too, and
        otherwise is the number that it last was; gradient_aggregator stays as it is.

        Args:
            path: the file.
            variables: those to read into, in the file's order, of its shapes and types. Default None: all that this
                optimizer has met, in that order; if it has met none, new ones on ``gpurms.array_module()``.
            custom_objects: classes of the caller's own schedules by class name.

        Returns:
            The variables.

        Raises:
            OSError: the file cannot be read. Where that happens after the header, in the data, variables and slots may
                have been overwritten in part; everything else that fails does so before anything changes.
            RuntimeError: steps have been captured in graphs, which go on with the slots that they have, and the file
                has others.
            TypeError: a variable of another type, or no variable.
            ValueError: no checkpoint, a damaged or truncated one, or one of another version; settings that this
                optimizer or a schedule's class refuses, with their error as its cause; other variables than the file's,
                or than those this optimizer has slots for.

        >>> import os, tempfile
        >>> from gpurms import RMSprop
        >>> opt, var = RMSprop(0.1, momentum=0.9), np.zeros(2)
        >>> opt.apply_gradients([(np.ones(2), var)])
        np.int64(1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "step-1.safetensors")
        ...     opt.save(path)
        ...     new, table = RMSprop(), np.empty(2)
        ...     new.load(path, [table])
        [array([-0.31622761, -0.31622761])]
        >>> new.momentum, new.iterations.numpy(), new.get_slot_names()
        (0.9, array(1), ['rms', 'momentum'])
        """
        from gpurms import checkpoint

        return checkpoint.load(cast("RMSprop", self), path, variables, custom_objects)

    def __getstate__(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        attributes, slots = cast("tuple[dict[str, Any] | None, dict[str, Any]]", object.__getstate__(self))
        return attributes, {key: value for key, value in slots.items() if key not in MADE_ANEW}

    def __setstate__(self, state: tuple[dict[str, Any] | None, dict[str, Any]]) -> None:
        attributes, slots = state
        for key, value in {**(attributes or {}), **slots}.items():
            object.__setattr__(self, key, value)
        self._batches = ([], [])
        self._capture = Capture()
        self._repeat = None

    def _set_counter(self, counter: Counter) -> None:
        self._counter = counter
        self._slots.set_counter(counter.variable)

    def _new_counter(self, pairs: Sequence[Pair] = ()) -> Counter:
        """On the host, where it costs nothing to read; a capturable one beside the variables, for graphs to count."""
        on_device = [entry for entry, _, _ in pairs if entry.device is not None]
        library = backend.array_module() if self.capturable else np
        with on_device[0].backend.near(on_device[0].view) if on_device else nullcontext():
            return Counter(Variable(library.zeros((), np.int64), name="iterations", trainable=False))

    def _count(self) -> np.int64:
        return np.int64(0) if self._counter is None else self._counter.read()

    def _new_slot(self, entry: Entry, name: str, value: float = 0.0) -> Variable:
        natural = entry.compute if entry.dtype.itemsize == 2 else entry.dtype
        dtype = natural if self.slot_dtype is None else self.slot_dtype
        owner = entry.variable.name if isinstance(entry.variable, Variable) else "array"
        array = entry.backend.full(entry.view, value, dtype)
        return Variable(array, name=f"{self.name}/{owner}/{name}", trainable=False)


def _initialize(variable: Variable, initializer: Any) -> None:
    if callable(initializer) and not isinstance(initializer, Variable):
        initializer = initializer(variable.shape, variable.dtype)
    elif isinstance(initializer, str):
        if initializer not in ("zeros", "ones"):
            raise ValueError(f"initializer must be 'zeros', 'ones', a function or a value; got {initializer!r}")
        if initializer == "zeros":
            return
        initializer = np.ones(variable.shape)
    variable.assign(initializer)
