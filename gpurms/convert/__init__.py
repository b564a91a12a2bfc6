"""Optimizer state of other libraries, to and from.

Each import makes an ``RMSprop`` that goes on with the given variables as the source library would have; each export
gives what the other library loads to go on as the optimizer would have. Variables are matched by their order. Their
values are the caller's to copy: only accumulators, the number of steps and the settings are converted.

Everything is checked before anything is made or written. What the other side could not go on with is a ``ValueError``.
"""

from gpurms.convert.keras3 import from_keras3 as from_keras3
from gpurms.convert.keras3 import to_keras3 as to_keras3
from gpurms.convert.optax import from_optax as from_optax
from gpurms.convert.optax import to_optax as to_optax
from gpurms.convert.tf_keras import from_tf_keras as from_tf_keras
from gpurms.convert.tf_keras import to_tf_keras as to_tf_keras
from gpurms.convert.torch import from_torch as from_torch
from gpurms.convert.torch import to_torch as to_torch
