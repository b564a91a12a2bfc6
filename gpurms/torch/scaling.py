"""What ``torch.amp.GradScaler`` tells an optimizer: the gradients' scale, and whether some were infinite or NaN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpurms.kernels.rule import Rule
from gpurms.torch.tensors import array, array_type


class Factors(NamedTuple):
    """The reciprocal of a scale, in float64, and by (device, compute type) on each GPU; or nothing."""

    reciprocal: Tensor | None
    on_gpu: dict[tuple[int, Any], Any] | None

    @property
    def host(self) -> float | None:
        """As a number."""
        return None if self.reciprocal is None else float(self.reciprocal.item())

    def of(self, rule: Rule, device: int | None) -> Any:
        """For an update: a number of the compute type, or an element on its GPU."""
        if self.on_gpu is None:
            return None
        if device is None:
            return rule.compute.type(self.host)
        from gpurms.kernels.cuda_norm import Factor

        return Factor(self.on_gpu[device, rule.compute], 0, None)


class LossScale(NamedTuple):
    """Both as the scaler gives them: tensors of one element, or None."""

    grad_scale: Tensor | None
    found_inf: Tensor | int | None

    def skips_on_host(self, parameters: Sequence[Tensor]) -> bool:
        """Whether to leave out the step, where the host can know without waiting or a parameter on it must.

        A GPU learns of ``found_inf`` on a GPU by itself, see ``skip``.
        """
        if not isinstance(self.found_inf, Tensor):  # 0: no parameter had a gradient
            return False
        on_host = not self.found_inf.is_cuda or not all(each.is_cuda for each in parameters)
        return on_host and bool(self.found_inf.item())

    def factors(self, devices: Sequence[int]) -> Factors:
        """What gradients are multiplied by, made without waiting for a GPU unless a host parameter needs it."""
        if self.grad_scale is None:
            return Factors(None, None)
        reciprocal = self.grad_scale.to(torch.float64).reciprocal().reshape(1)
        on_gpu = {
            (device, array_type(compute)): array(reciprocal.to(f"cuda:{device}", compute, non_blocking=True))
            for device in devices
            for compute in (torch.float32, torch.float64)
        }
        return Factors(reciprocal, on_gpu)

    def skip(self, devices: Sequence[int]) -> dict[int, Any] | None:
        """By GPU, a float32 that is not 0 where the step must be left out; None if the host knows that it is not."""
        if not isinstance(self.found_inf, Tensor) or not self.found_inf.is_cuda:
            return None
        flag = self.found_inf.to(torch.float32).reshape(1)
        return {device: array(flag.to(torch.device("cuda", device), non_blocking=True)) for device in devices}

    def count_step(self, steps: Sequence[Mapping[torch.device, list[Tensor]]]) -> None:
        """Add 1 to each of these, by device; on a GPU that leaves out the step 0."""
        for device in {device for by_device in steps for device in by_device}:
            if device.type == "cuda" and isinstance(self.found_inf, Tensor) and self.found_inf.is_cuda:
                one = (self.found_inf.reshape(()) == 0).to(device, torch.float32, non_blocking=True)
            else:
                one = torch.ones((), device=device)
            some = [step for by_device in steps for step in by_device.get(device, ())]
            torch._foreach_add_(some, one, alpha=1.0)
