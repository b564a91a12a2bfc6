"""``torch.optim.RMSprop``, fused: the optimizer's surface. What a step does stands in ``step.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from gpurms.torch import state, tensors
from gpurms.torch.scaling import LossScale
from gpurms.torch.step import GroupStep

OWN_OPTIONS = ("eps_in_sqrt", "lr_in_momentum", "nesterov", "decoupled_weight_decay")
"""Options of a parameter group that ``torch.optim.RMSprop`` does not have.

They are in the groups of an optimizer that uses one. All others have torch's entries and no more: only then does
``torch.distributed.checkpoint`` load what the other class has saved.
"""


class RMSprop(Optimizer):
    """``torch.optim.RMSprop`` in one pass over memory, on the CPU and on CUDA.

    Signature, semantics and ``state_dict`` are those of ``torch.optim.RMSprop``. For each parameter::

        g           = -grad                              if maximize, else grad
        g           = g + weight_decay*param             if weight_decay and not decoupled_weight_decay
        param       = param - lr*weight_decay*param      if weight_decay and decoupled_weight_decay
        square_avg  = square_avg + (g*g - square_avg)*(1 - alpha)
        grad_avg    = grad_avg + (g - grad_avg)*(1 - alpha)              if centered
        d           = max(square_avg - grad_avg*grad_avg, 0)             if centered, else square_avg
        den         = sqrt(d) + eps                      (sqrt(d + eps) if eps_in_sqrt)
        u           = g/den                              (lr*g/den if lr_in_momentum)
        buf         = momentum*buf + u                   if momentum
        step        = buf                                (u without momentum); momentum*buf + u if nesterov;
                                                         times lr if not lr_in_momentum
        param       = param - step

    All parameters of a group and type are updated together: one launch on a GPU, on torch's current stream, without
    synchronisation and without temporaries. Sparse COO gradients, uncoalesced ones included, update the rows that they
    name and leave all others, and their state, alone; weight decay too touches only those rows. On the CPU their
    indices are checked; on a GPU rows that do not exist are ignored. Gradients are never modified.

    Args:
        params: parameters, named parameters, or groups of them: float16, bfloat16, float32 or float64, on the CPU or
            CUDA, in any memory layout (dimensions that a gradient has sparse together must be as one in memory);
            DTensors too, of which each rank updates its own part.
        lr: step size >= 0, a number or a tensor of one element; one on a GPU is read there. Default 0.01.
        alpha: decay >= 0 of the moving averages. Default 0.99.
        eps: number >= 0, added to the root. Default 1e-8.
        weight_decay: number >= 0. Default 0.
        momentum: number >= 0. Default 0.
        centered: normalise by the estimated variance, kept >= 0. Default False.
        capturable: allow ``torch.cuda.graph`` to capture a step. As in torch, numbers are then fixed, and an ``lr``
            that is to change must be a tensor on the GPU. Take one step before. Default False.
        foreach: accepted, so that calls for torch.optim.RMSprop need no change; all ways of it are one way here.
        maximize: ascend. Default False.
        differentiable: must be False.
        eps_in_sqrt: ``eps`` inside the root, as in TensorFlow. Default False.
        lr_in_momentum: the momentum buffer holds steps, as in TensorFlow. Default False.
        nesterov: look ahead by one momentum step. Default False.
        decoupled_weight_decay: shrink parameters by ``lr*weight_decay`` instead of adding to gradients. Default False.

    Raises:
        ValueError: a number out of its range (NaN too), a parameter that is no leaf.
        RuntimeError: ``differentiable=True``; a parameter of another type or device. At a step: a gradient that is
            sparse in another layout than COO.
        IndexError: at a step, a sparse gradient for a row that does not exist (CPU).

    A graph that has captured a step must not outlive the optimizer, which keeps the memory of all it has captured. On
    the CPU a step takes all cores that the process may run on, or ``OMP_NUM_THREADS`` if that is less.

    A step that raises has changed nothing. State of 16-bit parameters is kept in float32, and stays so when it is saved
    and loaded; ``torch.optim.RMSprop`` rounds it to the parameters' type when it loads it. Under
    ``torch.amp.GradScaler`` the gradients' scale and the skip of a step with infinite ones are read where they are.

    >>> import torch
    >>> w = torch.tensor([1.0, -2.0], requires_grad=True)
    >>> optimizer = RMSprop([w], lr=0.1, eps=0)
    >>> w.grad = torch.tensor([0.5, 0.5])
    >>> optimizer.step()
    >>> w.detach()
    tensor([ 0., -3.])

    Source: PyTorch, ``torch/optim/rmsprop.py``, whose formulas these are; rounding differs in the last bits.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        eps_in_sqrt: bool = False,
        lr_in_momentum: bool = False,
        nesterov: bool = False,
        decoupled_weight_decay: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        own = (eps_in_sqrt, lr_in_momentum, nesterov, decoupled_weight_decay)
        if any(own):
            defaults.update(zip(OWN_OPTIONS, own))
        state.check_options(defaults)
        self._steps: dict[int, GroupStep] = {}
        self._captured: list[Any] = []  # what graphs use: they must not outlive the optimizer
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, which may have options of its own; see ``torch.optim.Optimizer``."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            state.check_options(group)
            for parameter in group["params"]:
                state.check_parameter(parameter)
        except BaseException:
            self.param_groups.pop()
            raise

    def __setstate__(self, state_: dict[str, Any]) -> None:
        super().__setstate__(state_)
        self._steps = {}  # which know tensors by their addresses
        self.__dict__.setdefault("_captured", [])
        for group in self.param_groups:
            for option, value in self.defaults.items():
                group.setdefault(option, value)
            for parameter in group["params"]:
                state.read(self.state.get(parameter))

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take the state of this class or of ``torch.optim.RMSprop``; see ``torch.optim.Optimizer``.

        Options that the saved groups lack stay as they are in this optimizer's.
        """
        loaded: list[StateDict] = []
        own_options = [
            {option: group[option] for option in OWN_OPTIONS if option in group} for group in self.param_groups
        ]

        def restore(_: Optimizer) -> None:
            for group, options, saved_group in zip(self.param_groups, own_options, loaded[0]["param_groups"]):
                group.update({option: value for option, value in options.items() if option not in saved_group})
            saved = [key for group in loaded[0]["param_groups"] for key in group["params"]]
            own = [parameter for group in self.param_groups for parameter in group["params"]]
            for key, parameter in zip(saved, own, strict=True):
                state.restore_types(self.state.get(parameter), loaded[0]["state"].get(key), parameter)

        # After the caller's own hooks that change what is loaded, and before those that look at the result.
        before = self.register_load_state_dict_pre_hook(lambda _, final: loaded.append(final))
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have gradients.

        Args:
            closure: evaluates the model again and returns the loss; it is called first, with gradients enabled.

        Returns:
            What ``closure`` returned, or None.
        """
        if torch.compiler.is_compiling():
            return _step_outside_of_graphs(self, closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = LossScale(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        groups = []
        for place in [place for place in self._steps if place >= len(self.param_groups)]:
            del self._steps[place]  # of a group that has been removed
        for place, group in enumerate(self.param_groups):
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                groups.append((self._steps.setdefault(place, GroupStep()), group, parameters))
        members = [parameter for _, _, parameters in groups for parameter in parameters]
        capturing = tensors.is_capturing(members)
        if scale.skips_on_host(members):
            return loss
        with tensors.streams(members):
            prepared = [
                known.prepare(group, parameters, self.state, scale, capturing) for known, group, parameters in groups
            ]
            for each in prepared:
                each.apply(self.state)
            scale.count_step([each.members.steps_by_device for each in prepared])
            torch.autograd.graph.increment_version(members)
            if capturing:
                self._captured.append(prepared)
        return loss


_step_outside_of_graphs = torch._disable_dynamo(RMSprop._step)  # type: ignore[attr-defined]  # private
"""For ``torch.compile``, whose graphs know no addresses; ``torch.compiler.disable`` would import all of Dynamo here."""
