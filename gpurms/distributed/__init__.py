"""Training on several processes without torch: averaged gradients, and embedding tables sharded by rows.

Each rank runs the same program on its own part of the data. ``MPIAverage`` and ``NCCLAverage`` plug into the optimizer;
a ``ShardedTable`` is larger than the memory of one rank::

    opt = RMSprop(0.01, gradient_aggregator=MPIAverage())
    table = ShardedTable(100_000_000, 64, name="words")

    rows = table.gather(ids)                         # ids of this rank's examples; rows come from their owners
    ...                                              # the gradients of rows and w
    slices = table.scatter(IndexedSlices(grad_of_rows, ids))
    opt.apply_gradients([(grad_of_w, w), (slices, table.shard)])

Every call that exchanges data is collective: all ranks make equally many of them, in the same order. It begins by
comparing, in a few words, its arguments: kinds, names, shapes and types, not values. Where they differ, or one of them
is refused, every rank raises the same error, nothing has changed, and all can go on. Settings of the optimizers are
compared by ``MPIAverage.agree(optimizer)`` and ``ShardedTable.apply``. Without, an optimizer that refuses the averages
on one rank alone raises there only, and the other ranks take the step. An exception outside of these calls is the
program's own: the other ranks wait for the rank that raised it, unless the program is started by
``mpiexec -n 4 python -m mpi4py``, which then stops them all.
"""

from gpurms.distributed.average import MPIAverage as MPIAverage
from gpurms.distributed.average import NCCLAverage as NCCLAverage
from gpurms.distributed.table import ShardedTable as ShardedTable
