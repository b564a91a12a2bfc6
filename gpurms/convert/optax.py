"""optax: the state of ``optax.rmsprop``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpurms.convert.common import (
    Array,
    count,
    entries_of,
    require_same_steps,
    required_slots,
    restore,
    slots_of,
    split,
)
from gpurms.dialects import OPTAX
from gpurms.rmsprop import RMSprop
from gpurms.schedules import LearningRateSchedule


def from_optax(state: Sequence[Any], variables: Any, *args: Any, **kwargs: Any) -> RMSprop:
    """The optimizer that goes on where an ``optax.rmsprop`` is.

    Args:
        state: its state: ``ScaleByRmsState``, or ``ScaleByRStdDevState`` if centered; that of the learning rate; and
            ``TraceState``, if it has momentum. Within ``optax.inject_hyperparams`` it is ``inner_state``.
        variables: those that stand for its parameters: a pytree, or a list in the order of its leaves.
        args: the arguments of ``optax.rmsprop``, which its state does not hold; a schedule is one of
            ``gpurms.schedules``, and goes on at the state's count. Without one, optax counts no steps, and
            ``iterations`` is 0.
        kwargs: the same, by name.

    Raises:
        ImportError: jax is not installed.
        TypeError: an unknown argument, or an array of a wrong type.
        ValueError: state that these arguments do not make, or of another number of variables or shape; an argument
            that ``dialects.OPTAX`` refuses.
    """
    import jax

    options = OPTAX.options(*args, **kwargs)
    entries = entries_of(jax.tree.leaves(variables))
    has_trace = OPTAX.__signature__.bind(*args, **kwargs).arguments.get("momentum") is not None
    is_scheduled = isinstance(options["learning_rate"], LearningRateSchedule)
    expected = [
        "ScaleByRStdDevState" if options["centered"] else "ScaleByRmsState",
        "ScaleByScheduleState" if is_scheduled else "EmptyState",
        "TraceState" if has_trace else "EmptyState",
    ]
    got = [type(part).__name__ for part in state] if isinstance(state, tuple | list) else type(state).__name__
    if got != expected:
        raise ValueError(f"with these arguments optax.rmsprop has the state {expected}; got {got}")
    scale, rate, trace = state
    leaves = {"rms": scale.nu}
    if "momentum" in required_slots(options["momentum"], options["centered"]):
        leaves["momentum"] = jax.tree.map(lambda leaf: -leaf, trace.trace)  # which holds steps to be added
    if options["centered"]:
        leaves["mg"] = scale.mu
    values = [leaf for tree in leaves.values() for leaf in jax.tree.leaves(tree)]
    slots = split(values, entries, list(leaves), "state")
    return restore(options, entries, slots, count(rate.count, "count") if is_scheduled else 0)


def to_optax(optimizer: RMSprop, variables: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The state with which ``optax.rmsprop`` goes on, and the arguments to make it with.

    Args:
        optimizer: one with the steps of optax, see ``dialects.OPTAX``.
        variables: those for the parameters, as a pytree of their structure; the optimizer has updated them all.

    Returns:
        The state, and the arguments of ``optax.rmsprop``. A schedule is missing from these: the state then has its
        count, and the schedule is the caller's to write as a function of jax.

    Raises:
        ImportError: optax is not installed.
        ValueError: settings that optax does not have; a slot that does not exist yet; float64 without
            ``jax_enable_x64``.
    """
    import jax
    import optax

    momentum = optimizer.momentum or None
    arguments = {
        "learning_rate": optimizer.learning_rate,
        "decay": optimizer.rho,
        "eps": optimizer.epsilon,
        "initial_scale": optimizer.initial_accumulator_value,
        "eps_in_sqrt": optimizer.eps_in_sqrt,
        "centered": optimizer.centered,
        "momentum": momentum,
        "nesterov": optimizer.nesterov,
    }
    require_same_steps(optimizer, OPTAX, arguments)
    leaves, structure = jax.tree.flatten(variables)
    entries = entries_of(leaves)
    names = required_slots(optimizer.momentum, optimizer.centered)
    slots = [slots_of(optimizer, entry, i, names) for i, entry in enumerate(entries)]

    def tree(name: str, sign: int = 1) -> Any:
        arrays = [_jax_array(sign * found[name], entry.dtype) for entry, found in zip(entries, slots)]
        return jax.tree.unflatten(structure, arrays)

    scale: Any = optax.ScaleByRmsState(tree("rms"))
    if optimizer.centered:
        scale = optax.ScaleByRStdDevState(mu=tree("mg"), nu=tree("rms"))
    rate: Any = optax.EmptyState()
    if isinstance(arguments["learning_rate"], LearningRateSchedule):
        del arguments["learning_rate"]
        rate = optax.ScaleByScheduleState(jax.numpy.asarray(int(optimizer.iterations.numpy()), jax.numpy.int32))
    trace = optax.EmptyState() if momentum is None else optax.TraceState(tree("momentum", -1))
    return (scale, rate, trace), arguments


def _jax_array(array: Array, dtype: Any) -> Any:
    import jax

    if dtype.itemsize == 8 and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]  # made at run time
        raise ValueError('float64 slots need jax.config.update("jax_enable_x64", True)')
    return jax.numpy.asarray(array, dtype)
