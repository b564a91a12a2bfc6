"""Options and state of ``torch.optim.RMSprop``: their checks, and the tensors that a parameter needs."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpurms.kernels.rule import Flags, Step
from gpurms.torch.tensors import TYPES, has_own_memory, is_dense, overlaps_itself, spread, steps

State = MutableMapping[str, Any]

_NUMBERS = {"lr": "learning rate", "eps": "epsilon value", "momentum": "momentum value",
            "weight_decay": "weight_decay value", "alpha": "alpha value"}  # fmt: skip


def check_options(group: Mapping[str, Any]) -> None:
    """ValueError for a number below 0 or NaN, RuntimeError for what is not done here; in torch's words."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    for option, words in _NUMBERS.items():
        value = group[option]
        if option == "lr" and isinstance(value, Tensor) and value.is_cuda:
            continue  # to look at it would mean to wait for it
        if not value >= 0.0:
            raise ValueError(f"Invalid {words}: {value}")
    if group["differentiable"]:
        raise RuntimeError("differentiable=True is not supported: a fused update has no gradient of its own")


def check_parameter(parameter: Tensor) -> None:
    """RuntimeError unless it is of a type, layout and device that can be updated."""
    if parameter.dtype not in TYPES:
        problem = f"expected {', '.join(map(str, TYPES))}; got {parameter.dtype}"
    elif parameter.device.type not in ("cpu", "cuda"):
        problem = f"expected it on the CPU or CUDA; got {parameter.device}"
    elif parameter.layout is not torch.strided:
        problem = f"expected a strided tensor; got {parameter.layout}"
    elif not has_own_memory(parameter):
        problem = f"expected a tensor with memory of its own; got a {type(parameter).__name__}, which wraps others"
    else:
        return  # of any shape: that of a lazy module's parameter is not known yet
    raise RuntimeError(f"a parameter of shape {tuple(parameter.shape)}: {problem}")


def read_step(group: Mapping[str, Any], has_factor: bool, live: Any, skip: Any) -> Step:
    """The numbers of a group, checked. An ``lr`` on a GPU is 0 here; the kernels read it where it is."""
    check_options(group)
    lr, weight_decay = group["lr"], float(group["weight_decay"])
    flags = Flags(
        has_factor=has_factor,
        maximize=bool(group["maximize"]),
        l2=weight_decay > 0 and not group.get("decoupled_weight_decay"),
        decoupled=weight_decay > 0 and bool(group.get("decoupled_weight_decay")),
        centered=bool(group["centered"]),
        has_momentum=bool(group["momentum"] > 0),
        nesterov=bool(group.get("nesterov")),
        eps_in_sqrt=bool(group.get("eps_in_sqrt")),
        lr_in_momentum=bool(group.get("lr_in_momentum")),
    )
    rate = 0.0 if isinstance(lr, Tensor) and lr.is_cuda else float(lr)
    rho, momentum, epsilon = (float(group[option]) for option in ("alpha", "momentum", "eps"))
    return Step(rate, rho, momentum, epsilon, weight_decay, None, flags, live, skip)


def slot_names(flags: Flags) -> list[str]:
    """The tensors of a parameter's state that the rule needs, in torch's order."""
    names = {"square_avg": True, "momentum_buffer": flags.has_momentum, "grad_avg": flags.centered}
    return [name for name, needed in names.items() if needed]


def missing(parameter: Tensor, state: State | None, names: Sequence[str]) -> State:
    """What the state of a parameter lacks, or has in an unfit place or layout, made anew.

    Slots are zeros of the parameter's shape, layout and placement, in the type of computation. The number of steps lies
    beside the parameter: a GPU that skips a step need not tell the host.

    Raises:
        RuntimeError: a parameter or a slot that cannot be updated.
    """
    check_parameter(parameter)
    state = state or {}
    new: State = {}
    step = state.get("step")
    if step is None:
        with torch.inference_mode(False):  # later steps may be outside of it
            new["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    elif not isinstance(step, Tensor) or step.numel() != 1 or step.is_meta:
        raise RuntimeError(f"state 'step': expected a tensor of one element; got {step!r:.80}")
    elif step.device != parameter.device or not step.is_floating_point() or step.is_inference():
        with torch.inference_mode(False):
            new["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device).copy_(step.reshape(()))
    for name in names:
        slot = state.get(name)
        if slot is None:
            compute = TYPES[parameter.dtype]
            with torch.inference_mode(False):
                new[name] = torch.zeros_like(parameter, dtype=compute, memory_format=torch.preserve_format)
            continue
        if not isinstance(slot, Tensor):
            raise RuntimeError(f"state {name!r}: expected a tensor; got {slot!r:.80}")
        if slot.shape != parameter.shape or slot.device != parameter.device or slot.dtype not in TYPES:
            raise RuntimeError(
                f"state {name!r} does not fit its parameter of shape {tuple(parameter.shape)} on {parameter.device}: "
                f"got {slot.dtype}, shape {tuple(slot.shape)}, on {slot.device}"
            )
        if spread(slot) != spread(parameter):
            raise RuntimeError(
                f"state {name!r} of a parameter of shape {tuple(parameter.shape)}: expected it spread over the ranks "
                f"like the parameter, by {spread(parameter)}; got {spread(slot)}. The functions of "
                "torch.distributed.checkpoint.state_dict load state that is whole or spread otherwise"
            )
        if overlaps_itself(slot) or (steps(slot) != steps(parameter) and is_dense(parameter)):
            new[name] = torch.empty_like(parameter, dtype=slot.dtype).copy_(slot)
    return new


def read(state: State | None) -> None:
    """Turn what old versions of torch have saved into what new ones expect."""
    if state and not torch.is_tensor(state["step"]):
        state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)


def restore_types(state: State | None, saved: Mapping[str, Any] | None, parameter: Tensor) -> None:
    """Undo what ``Optimizer.load_state_dict`` does to wider state: it rounds it to the parameter's type."""
    for name in ("square_avg", "momentum_buffer", "grad_avg"):
        if state is not None and saved is not None and name in state:
            wide = TYPES.get(parameter.dtype, parameter.dtype)
            state[name] = saved[name].to(device=parameter.device, dtype=wide)
