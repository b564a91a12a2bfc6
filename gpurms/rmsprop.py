"""The optimizer: ``tf.keras.optimizers.RMSprop`` of TensorFlow r2.0 for NumPy and CuPy arrays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self, cast

import numpy as np

from gpurms import backend, gradients, hyper, settings, step, tape
from gpurms.arguments import flag
from gpurms.backend import Backend
from gpurms.hyper import Hyperparameter, Setting
from gpurms.slots import Entry, Slots, array_of, label
from gpurms.variable import Variable

_names = itertools.count()


class RMSprop:
    """RMSprop as TensorFlow r2.0 defines it, in one pass over memory.

    For each variable, with gradient ``g`` (every line one or more single IEEE operations in the compute type: float32
    for float16, bfloat16 and float32 variables, float64 for float64)::

        g    = grad                          * clip factor, if any;  -g if maximize
        g    = g + weight_decay*var          if weight_decay and not decoupled_weight_decay
        var  = var - lr*weight_decay*var     if weight_decay and decoupled_weight_decay
        rms  = rms + (g*g - rms)*(1 - rho)
        mg   = mg  + (g - mg)*(1 - rho)      if centered
        d    = max(rms - mg*mg, 0)           if centered, else rms
        den  = sqrt(d + epsilon)             if eps_in_sqrt, else sqrt(d) + epsilon
        u    = (lr*g)/den                    if lr_in_momentum, else g/den
        mom  = momentum*mom + u              if the variable has a momentum slot
        step = mom                           (u without the slot); momentum*mom + u if nesterov;
                                             times lr if not lr_in_momentum
        var  = var - step

    A gradient given as ``IndexedSlices`` updates the rows it names and leaves all others, and their accumulators,
    alone. Values that share an index are summed first, in order of occurrence, as a tree of fan-in 32: the result is
    the same on every backend, to the bit.

    Args:
        learning_rate: number >= 0, zero-argument callable, or ``schedules.LearningRateSchedule``.
        rho: decay of the moving averages, number in [0, 1] or callable.
        momentum: number in [0, 1] or callable. A momentum slot exists where it is positive or a callable.
        epsilon: number >= 0 or callable; None means 1e-7, 0 is honoured.
        centered: normalise by the estimated variance instead of the uncentered second moment.
        name: name of the optimizer; None makes a unique one.
        clipnorm: limit for the L2 norm of each gradient.
        clipvalue: limit for the absolute value of each element, applied before the norm is taken.
        global_clipnorm: limit for the L2 norm over all gradients of a call; excludes clipnorm.
        lr: another name of learning_rate, which it overrides.
        decay: number >= 0 or callable; the rate of a step is ``learning_rate / (1 + decay*iterations)``.
        weight_decay: number >= 0, or None for none.
        decoupled_weight_decay: True: the variable shrinks by ``lr*weight_decay`` (Keras 3); False: ``weight_decay*var``
            is added to the gradient (L2, PyTorch).
        eps_in_sqrt: epsilon inside the square root (TensorFlow with momentum, Keras 3) or outside (PyTorch).
        lr_in_momentum: the momentum buffer holds steps (TensorFlow) or normalised gradients (PyTorch).
        nesterov: look ahead by one momentum step.
        maximize: ascend instead of descend.
        initial_accumulator_value: value >= 0 at which ``rms`` starts.
        slot_dtype: type of the accumulators; None: float32 for 16-bit variables, else the variable's.
        check_indices: on a GPU, check the indices of sparse gradients before anything changes, at the cost of a
            synchronisation; False ignores rows out of range there. On the CPU the check is always made.

    Raises:
        TypeError: an unknown argument, or one of a wrong type.
        ValueError: a number out of its range; both norms at once.

    All settings are attributes and may be changed at any time; ``lr`` is ``learning_rate``.

    >>> import numpy as np
    >>> opt = RMSprop(learning_rate=0.1)
    >>> var = np.array([1.0, -2.0])
    >>> opt.apply_gradients([(np.array([0.5, 0.5]), var)])
    np.int64(1)
    >>> var
    array([ 0.68377287, -2.31622713])

    Source: TensorFlow r2.0, ``tensorflow/python/keras/optimizer_v2/rmsprop.py``; the algorithm is from T. Tieleman and
    G. Hinton, Lecture 6.5 of "Neural Networks for Machine Learning" (2012), the centered form from A. Graves,
    arXiv:1308.0850 (2013). Unlike TensorFlow's code, and like its page, epsilon stands inside the root whatever the
    momentum, sparse gradients touch only their rows, and clipping works in ``apply_gradients``.
    """

    __slots__ = ("__weakref__", "_batches", "_iterations", "_settings", "_slots")

    learning_rate = Hyperparameter(hyper.non_negative, "Step size: float, or the schedule.", schedule=True)
    rho = Hyperparameter(hyper.fraction, "Decay of the moving averages.")
    momentum = Hyperparameter(hyper.fraction, "Momentum.")
    epsilon = Hyperparameter(hyper.fuzz, "Added to the second moment.")
    decay = Hyperparameter(hyper.non_negative, "Inverse-time decay of the learning rate per step.")
    centered = Setting(flag, "Whether the variance is estimated instead of the second moment.")
    name = Setting(hyper.text, "Name of the optimizer.")
    clipnorm = Setting(hyper.limit, "Limit of each gradient's norm, or None.", excludes="global_clipnorm")
    clipvalue = Setting(hyper.limit, "Limit of each element, or None.")
    global_clipnorm = Setting(hyper.limit, "Limit of the norm over all gradients, or None.", excludes="clipnorm")
    weight_decay = Setting(hyper.limit, "Weight decay, or None.")
    decoupled_weight_decay = Setting(flag, "Whether the decay bypasses the gradient.")
    eps_in_sqrt = Setting(flag, "Whether epsilon stands inside the root.")
    lr_in_momentum = Setting(flag, "Whether the momentum buffer includes the learning rate.")
    nesterov = Setting(flag, "Whether momentum looks ahead.")
    maximize = Setting(flag, "Whether the objective is maximised.")
    initial_accumulator_value = Setting(hyper.non_negative, "Start of rms, for slots made from now on.")
    slot_dtype = Setting(hyper.slot_type, "Type of slots made from now on, or None.")
    check_indices = Setting(flag, "Whether sparse indices are checked on a GPU.")

    def __init__(
        self,
        learning_rate: Any = 0.001,
        rho: Any = 0.9,
        momentum: Any = 0.0,
        epsilon: Any = 1e-7,
        centered: bool = False,
        name: str | None = "RMSprop",
        **kwargs: Any,
    ) -> None:
        self._settings: dict[str, Any] = {}
        self._slots = Slots()
        self._iterations: Variable | None = None
        self._batches: tuple[list[Entry], list[tuple[Backend, list[int]]]] = ([], [])
        options = settings.DEFAULTS | kwargs
        self.learning_rate = options.pop("lr", learning_rate)
        if unknown := options.keys() - settings.DEFAULTS.keys():
            raise TypeError(f"Unexpected keyword argument passed to optimizer: {', '.join(sorted(unknown))}")
        self.rho = rho
        self.momentum = momentum
        self.epsilon = epsilon
        self.centered = centered
        self.name = _unique_name() if name is None else name
        for option, value in options.items():
            setattr(self, option, value)

    @property
    def lr(self) -> Any:
        """Another name of ``learning_rate``."""
        return self.learning_rate

    @lr.setter
    def lr(self, value: Any) -> None:
        self.learning_rate = value

    # ---------------------------------------------------------------------------------------------- updates

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]], name: str | None = None) -> np.int64:
        """Update variables by their gradients, one step.

        Everything is checked before anything changes: a call that raises leaves variables, slots and counter as they
        were (a constraint that raises is the exception: the step stands).

        Args:
            grads_and_vars: iterable of (gradient, variable), consumed once. A gradient is an array of the variable's
                library, shape and type (float32 or float64 will do for 16-bit variables), an ``IndexedSlices``, or None
                for a variable to skip, with a warning. A variable is a ``Variable`` or a writeable array, updated in
                place; the same memory is the same variable. A variable that occurs twice is updated twice, in order.
            name: accepted for compatibility with TensorFlow, where it names an operation; without effect.

        Returns:
            The number of steps taken so far. An empty iterable is no step.

        Raises:
            TypeError: a malformed pair, or an array of a wrong type or library.
            ValueError: a shape that differs; no gradient at all; a hyperparameter out of its range.
            IndexError: an index of a sparse gradient outside the rows of its variable.
            RuntimeError: a sparse gradient for a variable with a constraint.

        >>> import numpy as np
        >>> opt, table = RMSprop(0.1), np.zeros((4, 2))
        >>> from gpurms import IndexedSlices
        >>> opt.apply_gradients([(IndexedSlices(np.ones((2, 2)), np.array([1, 1])), table)])
        np.int64(1)
        >>> table[:2].round(4).tolist()
        [[0.0, 0.0], [-0.3162, -0.3162]]
        """
        return self._apply(grads_and_vars, name)

    def _apply(self, grads_and_vars: Iterable[tuple[Any, Any]], name: str | None) -> np.int64:
        _check_name(name)
        items = gradients.read_pairs(grads_and_vars)
        if not items:
            return self._count()
        counter = self._writeable_counter()
        pairs = gradients.check_pairs(self._slots, items)
        now = step.read(self, int(self._count()))
        new_slots = step.missing_slots(self, pairs, now.flags)
        apply = step.plan(self, pairs, now, new_slots)

        apply()
        for entry, slot_name, slot in new_slots:
            self._slots.adopt(entry)
            self._slots.add(entry, slot_name, slot)
        if counter is None:
            counter = self.iterations
        counter._array[...] += 1
        for variable in {id(variable): variable for grad, variable in items if grad is not None}.values():
            _constrain(variable)
        return self._count()

    def minimize(
        self,
        loss: Callable[[], Any],
        var_list: Any,
        grad_loss: Any = None,
        name: str | None = None,
    ) -> np.int64:
        """Differentiate ``loss`` with respect to the variables and apply the gradients.

        Args:
            loss: zero-argument callable that computes the loss from ``variable.value`` and ``gpurms.gather``. A
                non-scalar loss stands for its sum.
            var_list: a variable, a nested list or tuple of variables, or a callable that returns one of these and is
                evaluated after the loss.
            grad_loss: array of the loss's shape by which its elements are weighted.
            name: as in ``apply_gradients``.

        Returns:
            The number of steps taken so far.

        Raises:
            TypeError: loss is not callable.
            ValueError: var_list holds something that is not a variable; and what ``apply_gradients`` raises.

        >>> from gpurms import Variable
        >>> opt, v = RMSprop(0.1), Variable(10.0)
        >>> opt.minimize(lambda: v.value**2 / 2, [v])
        np.int64(1)
        >>> v.numpy()
        array(9.683772, dtype=float32)
        """
        grads, variables = tape.differentiate(loss, var_list, grad_loss)
        return self._apply(zip(grads, variables, strict=True), name)

    def get_gradients(self, loss: Callable[[], Any], params: Any) -> list[Any]:
        """Gradients of ``loss`` with respect to ``params``, unclipped; arguments as in ``minimize``.

        Raises:
            ValueError: the loss does not depend on one of them.

        >>> from gpurms import Variable
        >>> v = Variable(3.0)
        >>> RMSprop().get_gradients(lambda: v.value**2, [v])
        [array(6., dtype=float32)]
        """
        return self._gradients(loss, params)[0]

    def _gradients(self, loss: Callable[[], Any], params: Any) -> tuple[list[Any], list[Any]]:
        grads, variables = tape.differentiate(loss, params, None)
        for grad, variable in zip(grads, variables, strict=True):
            if grad is None:
                raise ValueError(
                    f"V{label(variable)[1:]} has `None` for gradient: the loss does not depend on it through `value` "
                    "or `gather`"
                )
        return grads, variables

    def get_updates(self, loss: Callable[[], Any], params: Any) -> list[np.int64]:
        """Apply ``get_gradients(loss, params)``; returns the number of steps taken so far, in a list.

        >>> from gpurms import Variable
        >>> opt, v = RMSprop(0.1), Variable(10.0)
        >>> opt.get_updates(lambda: v.value**2 / 2, [v])
        [np.int64(1)]
        """
        grads, variables = self._gradients(loss, params)
        return [self._apply(zip(grads, variables, strict=True), None)]

    # ------------------------------------------------------------------------------------------------ state

    @property
    def iterations(self) -> Variable:
        """The counter of steps: a 0-d int64 ``Variable``, made at the first access or step.

        May be set to a ``Variable`` of the caller's before it exists, which is then counted up; RuntimeError later.
        """
        if self._iterations is None:
            self._set_counter(Variable(np.zeros((), np.int64), name="iterations", trainable=False))
        assert self._iterations is not None
        return self._iterations

    @iterations.setter
    def iterations(self, variable: Variable) -> None:
        if self._iterations is not None:
            raise RuntimeError(
                "Cannot set `iterations` to a new Variable after the Optimizer weights have been created; "
                "use `iterations.assign`"
            )
        if not isinstance(variable, Variable) or variable.shape != () or variable.dtype != np.int64:
            raise TypeError(f"iterations must be a 0-d int64 Variable; got {variable!r}")
        self._set_counter(variable)

    @property
    def weights(self) -> list[Variable]:
        """The live list of the counter and all slots; empty until the counter exists.

        After the counter, for each call that met new variables: ``rms`` of each of them, ``momentum`` of each, ``mg``
        of each, as far as they are in use.
        """
        return self._slots.weights

    def variables(self) -> list[Variable]:
        """The same list as ``weights``."""
        return self._slots.weights

    def get_weights(self) -> list[np.ndarray[Any, Any]]:
        """Copies of all ``weights`` in host memory."""
        return [weight.numpy() for weight in self.weights]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Write what ``get_weights`` returned, or the same without the counter, which then becomes 0.

        Raises:
            TypeError: weights is not a list or tuple, or an entry does not convert.
            ValueError: another number of entries, or another shape of one; nothing has been changed then.
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
            weight._array[...] = new

    def get_slot_names(self) -> list[str]:
        """Names of the slots in use, in order of first use: of ``rms``, ``momentum``, ``mg`` and the caller's own."""
        return list(self._slots.names)

    def get_slot(self, var: Any, slot_name: str) -> Variable:
        """The slot of a variable.

        Raises:
            KeyError: the optimizer has not met the variable, or it has no slot of that name.
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

    def get_config(self) -> dict[str, Any]:
        """The settings as a JSON-serializable dict: TensorFlow's keys, then the options that differ from defaults.

        >>> RMSprop(0.01, momentum=0.9, clipnorm=1, nesterov=True).get_config()
        {'name': 'RMSprop', 'clipnorm': 1.0, 'learning_rate': 0.01, 'decay': 0.0, 'rho': 0.9, 'momentum': 0.9, \
'epsilon': 1e-07, 'centered': False, 'nesterov': True}
        """
        return settings.save(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """The optimizer that ``get_config`` described, here, in tf.keras or in Keras 3.

        Args:
            config: the dict; it is not modified.
            custom_objects: classes of the caller's own schedules by class name.

        Raises:
            TypeError: an unknown key.
            ValueError: a key of Keras for something this optimizer does not do, or a bad schedule.

        >>> RMSprop.from_config({"learning_rate": 0.5, "rho": 0.8}).rho
        0.8
        """
        return cls(**settings.load(config, custom_objects))

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.get_config().items())
        return f"{type(self).__name__}({settings})"

    def __getstate__(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        attributes, slots = cast("tuple[dict[str, Any] | None, dict[str, Any]]", object.__getstate__(self))
        return attributes, {key: value for key, value in slots.items() if key != "_batches"}

    def __setstate__(self, state: tuple[dict[str, Any] | None, dict[str, Any]]) -> None:
        attributes, slots = state
        for key, value in {**(attributes or {}), **slots}.items():
            object.__setattr__(self, key, value)
        self._batches = ([], [])

    # --------------------------------------------------------------------------------------------- internals

    def _set_counter(self, variable: Variable) -> None:
        self._iterations = variable
        self._slots.set_counter(variable)

    def _writeable_counter(self) -> Variable | None:
        counter = self._iterations
        if counter is not None and not backend.require(counter._array).writeable([counter._array]):
            raise TypeError("iterations has been made read-only")
        return counter

    def _count(self) -> np.int64:
        return np.int64(0) if self._iterations is None else np.int64(self._iterations.numpy())

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


def _constrain(variable: Any) -> None:
    constraint = variable.constraint if isinstance(variable, Variable) else None
    if constraint is None:
        return
    array = variable._array
    result = array_of(constraint(array))
    if np.shape(result) != array.shape:
        raise ValueError(f"{label(variable)}: its constraint must return shape {array.shape}; got {np.shape(result)}")
    array[...] = result


def _check_name(name: str | None) -> None:
    if name is not None:
        hyper.text("name", name)


def _unique_name() -> str:
    number = next(_names)
    return f"rm_sprop_{number}" if number else "rm_sprop"
