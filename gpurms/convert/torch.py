"""PyTorch: the ``state_dict`` of ``torch.optim.RMSprop``; that of ``gpurms.torch.RMSprop`` has some options more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpurms.convert.common import (
    Array,
    count,
    entries_of,
    has_slots,
    numbers,
    rate_of_now,
    require_same_steps,
    required_slots,
    restore,
    slots_of,
)
from gpurms.dialects import TORCH
from gpurms.rmsprop import RMSprop

_BUFFERS = {"rms": "square_avg", "momentum": "momentum_buffer", "mg": "grad_avg"}
_OWN_OPTIONS = ("eps_in_sqrt", "lr_in_momentum", "nesterov", "decoupled_weight_decay")
"""What groups of ``gpurms.torch.RMSprop`` have besides."""
_SCHEDULERS_NOTES = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")
_NO_OPTIONS = ("params", "param_names", *_SCHEDULERS_NOTES)
"""Keys of a parameter group that are no arguments: torch's LR schedulers keep numbers of their own there."""


def from_torch(state_dict: Mapping[str, Any], variables: Iterable[Any]) -> RMSprop:
    """The optimizer that goes on where a ``torch.optim.RMSprop`` or ``gpurms.torch.RMSprop`` is.

    Args:
        state_dict: what its ``state_dict()`` returned. Parameters without state, which have had no gradient, get none
            here. Where parameters have made different numbers of steps, ``iterations`` is the largest, on which nothing
            that torch does depends.
        variables: those that stand for its parameters, in their order over all groups.

    Raises:
        TypeError: an unknown option in a parameter group, or an array of a wrong type.
        ValueError: parameter groups of different options, which one optimizer cannot have; state that is missing,
            unknown or of another shape; an option that ``dialects.TORCH`` refuses.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"expected the state_dict of a torch optimizer, with state and param_groups; got {state_dict!r:.80}"
        )
    options, order = _groups(state_dict["param_groups"])
    entries = entries_of(variables)
    if len(order) != len(entries):
        raise ValueError(f"expected a variable for each of {len(order)} parameters; got {len(entries)}")
    state = state_dict["state"]
    if unknown := state.keys() - set(order):
        raise ValueError(f"state of parameters that are in no group: {sorted(unknown, key=str)}")
    names = required_slots(options["momentum"], options["centered"])
    slots, steps = [], [0]
    for key in order:
        found = state.get(key) or {}
        slots.append(_slots(found, names, f"state[{key!r}]"))
        if found:
            steps.append(count(_host(found["step"]), f"state[{key!r}]['step']"))
    return restore(options, entries, slots, max(steps))


def to_torch(optimizer: RMSprop, variables: Iterable[Any]) -> dict[str, Any]:
    """The ``state_dict`` with which a ``torch.optim.RMSprop`` of one parameter group goes on.

    Args:
        optimizer: one with the steps of torch, see ``dialects.TORCH``.
        variables: those for its parameters, in their order. One that the optimizer has not updated gets no state.

    Returns:
        What ``load_state_dict`` takes, options included; tensors are on the CPU, and torch moves them.

    Raises:
        ImportError: torch is not installed.
        ValueError: settings that torch does not have, or a schedule; a slot that does not exist yet.
    """
    import torch

    arguments = {
        "lr": rate_of_now(optimizer, TORCH.source),
        "momentum": optimizer.momentum,
        "alpha": optimizer.rho,
        "eps": optimizer.epsilon,
        "centered": optimizer.centered,
        "weight_decay": optimizer.weight_decay or 0.0,
        "capturable": False,
        "foreach": None,
        "maximize": optimizer.maximize,
        "differentiable": False,
    }
    require_same_steps(optimizer, TORCH, arguments)
    entries = entries_of(variables)
    names = required_slots(optimizer.momentum, optimizer.centered)
    state = {}
    for i, entry in enumerate(entries):
        if has_slots(optimizer, entry):
            dtype = getattr(torch, entry.dtype.name)
            buffers = slots_of(optimizer, entry, i, names)
            state[i] = {
                "step": torch.tensor(float(optimizer.iterations.numpy())),
                **{_BUFFERS[name]: torch.from_numpy(buffers[name]).to(dtype) for name in names},
            }
    return {"state": state, "param_groups": [{**arguments, "params": list(range(len(entries)))}]}


def _groups(groups: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[Any]]:
    """The one set of options of all groups, and the parameters of all of them."""
    if not groups:
        raise ValueError("param_groups is empty")
    found = []
    for group in groups:
        arguments = {key: value for key, value in group.items() if key not in _NO_OPTIONS}
        if hasattr(arguments.get("lr"), "detach"):
            arguments["lr"] = float(arguments["lr"])
        own = {key: bool(arguments.pop(key)) for key in _OWN_OPTIONS if key in arguments}
        if own:
            own["dense_only"] = False  # its steps of sparse gradients are those of this library
        found.append(TORCH.options(**arguments) | own)
    for i, options in enumerate(found):
        if differing := [
            f"{key} ({found[0][key]!r}, {options[key]!r})" for key in options if options[key] != found[0][key]
        ]:
            raise ValueError(
                f"parameter groups 0 and {i} differ in {', '.join(differing)}, and an optimizer has one set of "
                "options: make a state_dict, and an optimizer, of each group"
            )
    return found[0], [parameter for group in groups for parameter in group["params"]]


def _slots(found: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, Array]:
    """The buffers in use; one that the options have no use for is left alone by torch as well."""
    if not found:
        return {}
    expected = ["step", *(_BUFFERS[name] for name in names)]
    if missing := [key for key in expected if key not in found]:
        raise ValueError(f"{where}: expected {', '.join(expected)}; {', '.join(missing)} is missing")
    if unknown := found.keys() - {"step", *_BUFFERS.values()}:
        raise ValueError(f"{where}: expected {', '.join(expected)}; got {', '.join(sorted(unknown))} too")
    return {name: numbers(_host(found[_BUFFERS[name]]), f"{where}[{_BUFFERS[name]!r}]") for name in names}


def _host(tensor: Any) -> Any:
    """A tensor as what NumPy can take, which knows no bfloat16."""
    if not hasattr(tensor, "detach"):
        return tensor
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() and tensor.element_size() == 2 else tensor).numpy()
