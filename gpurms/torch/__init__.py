"""A drop-in for ``torch.optim.RMSprop``: one fused pass over memory, sparse gradients, no synchronisation.

>>> from gpurms.torch import RMSprop  # doctest: +SKIP
>>> optimizer = RMSprop(model.parameters(), lr=0.01)  # doctest: +SKIP
"""

from gpurms.torch.optimizer import RMSprop as RMSprop
