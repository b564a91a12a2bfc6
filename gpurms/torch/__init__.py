"""A drop-in for ``torch.optim.RMSprop``: one fused pass over memory, sparse gradients, no synchronisation::

from gpurms.torch import RMSprop

optimizer = RMSprop(model.parameters(), lr=0.01)
"""

from gpurms.torch.optimizer import RMSprop as RMSprop
