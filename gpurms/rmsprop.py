"""The optimizer: ``tf.keras.optimizers.RMSprop`` of TensorFlow r2.0 for NumPy and CuPy arrays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import numpy as np

from gpurms import backend, capture, gradients, hyper, repeat, settings, step, tape
from gpurms.arguments import flag
from gpurms.hyper import Hyperparameter, Setting
from gpurms.kernels.rule import Step
from gpurms.slots import array_of, label
from gpurms.state import State
from gpurms.variable import Variable

_names = itertools.count()


class RMSprop(State):
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
        learning_rate: number >= 0, zero-argument callable, or ``schedules.LearningRateSchedule``. Default 0.001.
        rho: decay of the moving averages, number in [0, 1] or callable. Default 0.9.
        momentum: number in [0, 1] or callable. A momentum slot exists where it is positive or a callable. Default 0.
        epsilon: number >= 0 or callable; None means the default, 0 is honoured. Default 1e-7.
        centered: normalise by the estimated variance instead of the uncentered second moment. Default False.
        name: name of the optimizer; None makes a unique one. Default "RMSprop".
        clipnorm: limit for the L2 norm of each gradient. Default None: no limit.
        clipvalue: limit for the absolute value of each element, applied before the norm is taken. Default None.
        global_clipnorm: limit for the L2 norm over all gradients of a call; excludes clipnorm. Default None.
        lr: another name of learning_rate, which it overrides.
        decay: number >= 0 or callable; the rate of a step is ``learning_rate / (1 + decay*iterations)``. Default 0.
        weight_decay: number >= 0. Default None: no decay.
        decoupled_weight_decay: True: the variable shrinks by ``lr*weight_decay`` (Keras 3); False: ``weight_decay*var``
            is added to the gradient (L2, PyTorch). Default True.
        eps_in_sqrt: epsilon inside the square root (TensorFlow with momentum, Keras 3) or outside (PyTorch). Default
            True.
        lr_in_momentum: the momentum buffer holds steps (TensorFlow) or normalised gradients (PyTorch). Default True.
        nesterov: look ahead by one momentum step. Default False.
        maximize: ascend instead of descend. Default False.
        initial_accumulator_value: value >= 0 at which ``rms`` starts. Default 0.
        slot_dtype: type of the accumulators. Default None: float32 for 16-bit variables, else the variable's.
        check_indices: on a GPU, check the indices of sparse gradients before anything changes, at the cost of a
            synchronisation; False ignores rows out of range there. On the CPU the check is always made. Default True.
        dense_only: refuse sparse gradients, as libraries do that would update other rows too. Default False.
        gradient_aggregator: function of the list of (gradient, variable) pairs that returns such a list, called first
            in each ``apply_gradients``, before clipping: see ``gpurms.distributed``. It is no part of configs. Default
            None.

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

    __slots__ = ()

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
    capturable = Setting(flag, "Whether a CUDA graph can capture a step.")
    dense_only = Setting(flag, "Whether sparse gradients are refused.")
    gradient_aggregator = Setting(hyper.function, "Function that aggregates gradients over processes, or None.")

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
        super().__init__()
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
            RuntimeError: a sparse gradient for a variable with a constraint; a capture of something that a replay
                could not repeat.

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
        items = gradients.read_items(grads_and_vars)
        if self.gradient_aggregator is not None:
            items = gradients.read_items(self.gradient_aggregator(items))
        if not items:
            return self._count()
        if self._counter is not None:
            self._counter.require_writeable()
        now = None
        pointers = None if self._repeat is None else self._repeat.pointers(self, items)
        if self._repeat is not None and pointers is not None:
            now = step.read(self, int(self._count()))
            if now.flags == self._repeat.flags:
                return self._again(pointers, now)
        gradients.check_items(items)
        if step.clip(self) is not None:
            _check_whole(items)
        pairs = gradients.check_pairs(self._slots, items, self.check_indices, self.dense_only)
        captured = self.capturable and capture.is_capturing(pairs)
        if captured:
            capture.check(self._counter, pairs)
        elif self._counter is not None:
            self._capture.recount(self._counter)
        now = now or step.read(self, int(self._count()))
        new_slots = step.missing_slots(self, pairs, now.flags)
        if captured and new_slots:
            raise RuntimeError(capture.FIRST_STEP)
        counter = self._counter or self._new_counter(pairs)
        apply = step.plan(self, pairs, now, new_slots)
        launch = repeat.launch_of(self, items, pairs, now, apply)

        apply()
        for entry, slot_name, slot in new_slots:
            self._slots.adopt(entry)
            self._slots.add(entry, slot_name, slot)
        apply.settle()
        if self._counter is None:
            self._set_counter(counter)
        counter.increment(captured)
        if captured:
            self._capture.record(pairs, apply, now, step.clip(self))
        for variable in {id(variable): variable for grad, variable in items if grad is not None}.values():
            _constrain(variable)
        self._repeat = None if launch is None else repeat.Repeat(self, items, pairs, now, launch)
        return self._count()

    def _again(self, pointers: Any, now: Step) -> np.int64:
        """A step like the one before, but for gradients and numbers."""
        assert self._repeat is not None
        assert self._counter is not None
        self._repeat.launch(pointers, now)
        self._counter.increment()
        return self._counter.read()

    def prepare_replay(self) -> np.int64:
        """Evaluate the hyperparameters for the next replay of a captured step, and send them to the GPU.

        Call it before each launch of the graph, the first included, with the stream current on which the graph will
        run, whenever something changes from step to step: a schedule, a callable, decay, or an attribute set. It waits
        for nothing. A replay without it has the numbers of the last call of this or of ``apply_gradients`` outside a
        capture. Each call stands for one replay; of replays without it, a schedule knows only after the next
        ``apply_gradients``, which reads the counter of an optimizer that has captured steps.

        Returns:
            The number of steps taken when that replay is done.

        Raises:
            RuntimeError: no step has been captured with the terms and the norm limit that the optimizer has now; a
                graph has these fixed.
        """
        now = step.read(self, int(self._count()))
        self._capture.prepare(now, step.clip(self))
        assert self._counter is not None
        self._counter.expect()
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


def _constrain(variable: Any) -> None:
    constraint = variable.constraint if isinstance(variable, Variable) else None
    if constraint is None:
        return
    array = variable._array
    with backend.require(array).near(array):
        result = array_of(constraint(array))
        if np.shape(result) != array.shape:
            raise ValueError(
                f"{label(variable)}: its constraint must return shape {array.shape}; got {np.shape(result)}"
            )
        array[...] = result


def _check_whole(items: Iterable[tuple[Any, Any]]) -> None:
    for _, variable in items:
        if getattr(variable, "is_part", False):
            raise ValueError(
                f"{label(variable)}: clipnorm and global_clipnorm cannot clip it: it is a part of something, and the "
                "norm of the whole is not known here"
            )


def _check_name(name: str | None) -> None:
    if name is not None:
        hyper.text("name", name)


def _unique_name() -> str:
    number = next(_names)
    return f"rm_sprop_{number}" if number else "rm_sprop"
