"""Presets that make ``RMSprop`` do what the RMSprop of another library does, from that library's own arguments.

>>> TORCH(lr=1e-3, momentum=0.9).eps_in_sqrt
False
>>> CHAINER.options(lr=0.5)
{'learning_rate': 0.5, 'rho': 0.99, 'epsilon': 1e-08, 'eps_in_sqrt': False, 'dense_only': True}

The libraries differ in the place of epsilon, in whether the momentum buffer includes the learning rate, in the kind of
weight decay, in the start of ``rms`` and in their defaults. Where one of them does something that this library does
not, its dialect raises an error that says so. Beside the source library's learning rates, each takes a schedule of
``gpurms.schedules``.

Three differences remain, in favour of this library. Where rounding makes the variance of the centered form negative,
the source libraries go on with NaN and this one with 0. Variables of 16 bits get float32 accumulators and arithmetic.
And all but TensorFlow with momentum refuse sparse gradients, or update the rows these do not name: such dialects set
``dense_only``, and ``optimizer.dense_only = False`` gets updates of the named rows alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any, NoReturn, final

import numpy as np

from gpurms import schedules, settings
from gpurms.arguments import scalar
from gpurms.rmsprop import RMSprop
from gpurms.schedules import LearningRateSchedule


@final
class Dialect:
    """The RMSprop of another library, as a preset: calling it makes the optimizer.

    It takes the arguments of that library's constructor, with their names, order and defaults, but for the parameters
    to optimise.

    Raises:
        TypeError: an argument that the library's constructor does not have.
        ValueError: a value that asks for something this library does not do; and what ``RMSprop`` raises.

    >>> TIMM(lr=0.5).initial_accumulator_value
    1.0
    >>> inspect.signature(CHAINER)
    <Signature (lr: 'Any' = 0.01, alpha: 'Any' = 0.99, eps: 'Any' = 1e-08, eps_inside_sqrt: 'bool' = False) -> \
'dict[str, Any]'>
    """

    def __init__(self, library: str, translate: Callable[..., dict[str, Any]]) -> None:
        self.source = library
        self._translate = translate
        self.__name__ = translate.__name__
        self.__doc__ = translate.__doc__
        self.__signature__ = inspect.signature(translate)

    def options(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The keyword arguments of ``RMSprop`` that these arguments of the other library stand for."""
        try:
            self.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            names = ", ".join(self.__signature__.parameters)
            raise TypeError(f"{self.source}: {error}; its arguments here are {names}") from None
        return self._translate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> RMSprop:
        """The optimizer itself."""
        return RMSprop(**self.options(*args, **kwargs))

    def __repr__(self) -> str:
        return f"gpurms.dialects.{self.__name__}"

    def __reduce__(self) -> str:
        """By name: copies and pickles of a dialect are the dialect."""
        return self.__name__


def _dialect(library: str) -> Callable[[Callable[..., dict[str, Any]]], Dialect]:
    return partial(Dialect, library)


@_dialect("tf_keras.optimizers.legacy.RMSprop")
def TENSORFLOW(
    learning_rate: Any = 0.001,
    rho: Any = 0.9,
    momentum: Any = 0.0,
    epsilon: Any = 1e-7,
    centered: bool = False,
    name: str = "RMSprop",
    *,
    lr: Any = None,
    decay: float = 0.0,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
    gradient_aggregator: Callable[[Any], Any] | None = None,
    gradient_transformers: Any = None,
) -> dict[str, Any]:
    """The code of TensorFlow r2.0, whose successor is ``tf_keras.optimizers.legacy.RMSprop``.

    Epsilon stands inside the root with momentum and outside without; an epsilon of 0 means 1e-7. Learning rate, rho,
    momentum and decay are rounded to float32, whatever the variables are. Schedules are evaluated in float64, there in
    float32.

    Source: tensorflow r2.0, ``tensorflow/python/keras/optimizer_v2/rmsprop.py`` and ``optimizer_v2.py``; tf_keras 2.21,
    ``tf_keras/src/optimizers/legacy/rmsprop.py``.
    """
    if gradient_transformers is not None:
        _refuse("gradient_transformers", gradient_transformers, "compose the functions into one gradient_aggregator")
    number = scalar(momentum)
    has_momentum = callable(momentum) or (isinstance(number, Real) and float(number) > 0)
    return {
        "learning_rate": _rounded(_keras_rate(learning_rate if lr is None else lr)),
        "rho": _rounded(rho),
        "momentum": _rounded(momentum),
        "epsilon": epsilon or 1e-7,
        "centered": centered,
        "name": name,
        "decay": _rounded(decay),
        "clipnorm": clipnorm,
        "clipvalue": clipvalue,
        "global_clipnorm": global_clipnorm,
        "eps_in_sqrt": has_momentum,
        "dense_only": not has_momentum,
        "gradient_aggregator": gradient_aggregator,
    }


@_dialect("keras.optimizers.RMSprop")
def KERAS3(
    learning_rate: Any = 0.001,
    rho: float = 0.9,
    momentum: float = 0.0,
    epsilon: float = 1e-7,
    centered: bool = False,
    weight_decay: float | None = None,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite_frequency: int | None = None,
    loss_scale_factor: float | None = None,
    gradient_accumulation_steps: int | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Keras 3, and ``tf_keras.optimizers.RMSprop`` since 2.11: epsilon inside the root, decoupled weight decay.

    For float64 variables this is Keras with a ``floatx`` of float64. With one of float32 it rounds the learning rate,
    and norms when it clips.

    Source: keras 3.15, ``keras/src/optimizers/rmsprop.py`` and ``base_optimizer.py``.
    """
    clips = {"clipnorm": clipnorm, "clipvalue": clipvalue, "global_clipnorm": global_clipnorm}
    if sum(limit is not None for limit in clips.values()) > 1:
        raise ValueError(f"keras.optimizers.RMSprop takes one of clipnorm, clipvalue and global_clipnorm; got {clips}")
    return settings.load(
        {
            "learning_rate": _keras_rate(learning_rate),
            "rho": rho,
            "momentum": momentum,
            "epsilon": epsilon,
            "centered": centered,
            "name": "rmsprop" if name is None else name,
            **{key: limit or None for key, limit in clips.items()},  # 0 is "off" there
            "weight_decay": weight_decay or None,
            "dense_only": True,
            "use_ema": use_ema,
            "ema_momentum": ema_momentum,
            "ema_overwrite_frequency": ema_overwrite_frequency,
            "loss_scale_factor": loss_scale_factor,
            "gradient_accumulation_steps": gradient_accumulation_steps,
        },
        None,
    )


@_dialect("torch.optim.RMSprop")
def TORCH(
    lr: Any = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0,
    momentum: float = 0,
    centered: bool = False,
    capturable: bool = False,
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
) -> dict[str, Any]:
    """PyTorch: epsilon outside the root, the learning rate outside the momentum buffer, L2 weight decay.

    ``foreach`` chooses between ways to compute the same; there is one here.

    Source: torch 2.13, ``torch/optim/rmsprop.py``.
    """
    if differentiable:
        _refuse("differentiable", differentiable, "steps are not recorded for differentiation; expected False")
    return {
        "learning_rate": _rate("lr", lr, "a tensor is read at each step there: set optimizer.learning_rate instead"),
        "rho": alpha,
        "momentum": momentum,
        "epsilon": eps,
        "centered": centered,
        "weight_decay": weight_decay or None,
        "decoupled_weight_decay": False,
        "eps_in_sqrt": False,
        "lr_in_momentum": False,
        "maximize": maximize,
        "capturable": capturable,
        "dense_only": True,
    }


@_dialect("optax.rmsprop")
def OPTAX(
    learning_rate: Any,
    decay: Any = 0.9,
    eps: Any = 1e-8,
    initial_scale: Any = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Any = None,
    nesterov: bool = False,
    bias_correction: bool = False,
) -> dict[str, Any]:
    """optax: epsilon where it is asked for, the learning rate inside the momentum buffer.

    Source: optax 0.2.8, ``optax/_src/alias.py`` and ``transform.py``.
    """
    if bias_correction:
        _refuse("bias_correction", bias_correction, "averages are not corrected; warm the learning rate up instead")
    return {
        "learning_rate": _rate(
            "learning_rate", scalar(learning_rate), "write an optax schedule as a schedule of gpurms.schedules"
        ),
        "rho": decay,
        "momentum": 0.0 if momentum is None else momentum,
        "epsilon": eps,
        "centered": centered,
        "eps_in_sqrt": eps_in_sqrt,
        "nesterov": nesterov,
        "initial_accumulator_value": initial_scale,
        "dense_only": True,
    }


@_dialect("chainer.optimizers.RMSprop")
def CHAINER(lr: Any = 0.01, alpha: Any = 0.99, eps: Any = 1e-8, eps_inside_sqrt: bool = False) -> dict[str, Any]:
    """Chainer: no momentum, epsilon outside the root unless asked otherwise.

    Hooks are no arguments of its constructor: ``GradientClipping`` is ``global_clipnorm`` here, ``WeightDecay`` is
    ``weight_decay`` with ``decoupled_weight_decay=False``. ``chainer.optimizers.RMSpropGraves`` is ``RMSprop(1e-4,
    rho=0.95, momentum=0.9, epsilon=1e-4, centered=True)``.

    Source: chainer 7, ``chainer/optimizers/rmsprop.py`` (its formula; it no longer installs).
    """
    return {
        "learning_rate": _rate("lr", lr),
        "rho": alpha,
        "epsilon": eps,
        "eps_in_sqrt": eps_inside_sqrt,
        "dense_only": True,
    }


@_dialect("paddle.optimizer.RMSProp")
def PADDLE(
    learning_rate: Any,
    rho: Any = 0.95,
    epsilon: Any = 1e-6,
    momentum: Any = 0.0,
    centered: bool = False,
    *,
    weight_decay: float | None = None,
    grad_clip: Any = None,
    name: str | None = None,
) -> dict[str, Any]:
    """PaddlePaddle: epsilon inside the root, L2 weight decay; rho, epsilon and momentum are rounded to float32.

    Source: Paddle 3, ``python/paddle/optimizer/rmsprop.py`` and ``optimizer.py``,
    ``paddle/phi/kernels/impl/rmsprop_kernel_impl.h`` (its formula).
    """
    if grad_clip is not None:
        _refuse("grad_clip", grad_clip, "set clipvalue, clipnorm or global_clipnorm of the optimizer")
    if not (weight_decay is None or isinstance(weight_decay, Real)):
        _refuse("weight_decay", weight_decay, "for L2Decay pass its coefficient; L1Decay has no counterpart")
    return {
        "learning_rate": _rate("learning_rate", learning_rate),
        "rho": _rounded(rho),
        "momentum": _rounded(momentum),
        "epsilon": _rounded(epsilon),
        "centered": centered,
        "name": "RMSProp" if name is None else name,
        "weight_decay": weight_decay or None,
        "decoupled_weight_decay": False,
        "dense_only": True,
    }


@_dialect("timm.optim.RMSpropTF")
def TIMM(
    lr: Any = 1e-2,
    alpha: float = 0.9,
    eps: float = 1e-10,
    weight_decay: float = 0,
    momentum: float = 0.0,
    centered: bool = False,
    decoupled_decay: bool = False,
    *,
    lr_in_momentum: bool = True,
    caution: bool = False,
    corrected_weight_decay: bool = False,
    foreach: bool | None = None,
) -> dict[str, Any]:
    """timm: as TensorFlow 1, with ``rms`` starting at 1; weight decay of either kind.

    ``foreach`` chooses between ways to compute the same; there is one here. Arguments after ``decoupled_decay``, whose
    order differs between versions, are taken by name.

    Source: pytorch-image-models 1.0, ``timm/optim/rmsprop_tf.py`` (its formula).
    """
    if caution:
        _refuse("caution", caution, "steps are not masked by the sign of the gradient; expected False")
    if corrected_weight_decay:
        _refuse("corrected_weight_decay", corrected_weight_decay, "scale optimizer.weight_decay by lr / max_lr")
    return {
        "learning_rate": _rate("lr", lr),
        "rho": alpha,
        "momentum": momentum,
        "epsilon": eps,
        "centered": centered,
        "weight_decay": weight_decay or None,
        "decoupled_weight_decay": decoupled_decay,
        "lr_in_momentum": lr_in_momentum,
        "initial_accumulator_value": 1.0,
        "dense_only": True,
    }


def _refuse(argument: str, value: Any, instead: str) -> NoReturn:
    raise ValueError(f"{argument}={value!r:.80} asks for something this library does not do: {instead}")


def _rate(argument: str, value: Any, instead: str = "set optimizer.learning_rate from step to step") -> Any:
    """A number, or a schedule of this library."""
    if not isinstance(value, Real | LearningRateSchedule):
        _refuse(argument, value, f"expected a number or a schedule of gpurms.schedules; {instead}")
    return value


def _keras_rate(value: Any) -> Any:
    """A learning rate of Keras: its schedules, and what it serialises them to, become this library's."""
    if isinstance(value, Mapping):
        return schedules.deserialize(value)
    if hasattr(value, "get_config") and not isinstance(value, LearningRateSchedule):
        return schedules.deserialize({"class_name": type(value).__name__, "config": value.get_config()})
    return value


def _rounded(value: Any) -> Any:
    """A number rounded to float32, or a callable whose results are; anything else as it is."""
    if isinstance(value, LearningRateSchedule):
        return value
    if callable(value):
        return partial(_call_rounded, value)
    number = scalar(value)
    return float(np.float32(number)) if isinstance(number, Real) and not isinstance(number, bool) else value


def _call_rounded(function: Callable[[], Any]) -> Any:
    return _rounded(function())
