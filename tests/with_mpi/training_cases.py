"""Scikit-learn's digits by a linear softmax, in parallel and in one process."""

from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from gpurms import IndexedSlices, RMSprop
from gpurms.distributed import MPIAverage, ShardedTable

N_STEPS = 30
BATCH = 64


def digits(dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return (data.data / 16).astype(dtype), np.eye(10, dtype=dtype)[data.target]


def loss_and_grads(x: np.ndarray, y: np.ndarray, w: np.ndarray, b: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    logits = x @ w + b
    logits -= logits.max(axis=1, keepdims=True)
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    error = (p - y) / p.dtype.type(len(x))
    return -float(np.log((p * y).sum(axis=1)).mean()), x.T @ error, error.sum(axis=0)


def train(dtype: Any, n_parts: int, part: int | None, aggregator: Any = None) -> tuple[list[float], bytes]:
    """Each batch is cut into parts; `part`: the one of this rank, or None for the mean over all of them."""
    x, y = digits(dtype)
    w, b = np.zeros((64, 10), dtype), np.zeros(10, dtype)
    opt = RMSprop(0.01, momentum=0.9, centered=True, gradient_aggregator=aggregator)
    losses = []
    for step in range(N_STEPS):
        at = np.arange(step * BATCH, (step + 1) * BATCH) % len(x)
        grads = [
            loss_and_grads(x[mine], y[mine], w, b)[1:]
            for mine in (np.split(at, n_parts) if part is None else [np.split(at, n_parts)[part]])
        ]
        means = [sum(each) / dtype(len(grads)) for each in zip(*grads)]
        opt.apply_gradients(zip(means, (w, b)))
        losses.append(loss_and_grads(x, y, w, b)[0])
    return losses, w.tobytes() + b.tobytes()


def case_same_curve_as_one_process(comm: Any) -> None:
    losses, _ = train(np.float64, comm.size, comm.rank, MPIAverage(comm))
    alone, _ = train(np.float64, 1, None)
    assert losses[-1] < losses[0] / 2
    np.testing.assert_allclose(losses, alone, rtol=1e-6, atol=0)


def case_same_bits_as_one_process_where_the_order_of_sums_is_the_same(comm: Any) -> None:
    for dtype in (np.float32, np.float64):
        curve = train(dtype, comm.size, comm.rank, MPIAverage(comm))
        assert len(set(comm.allgather(curve[1]))) == 1
        if comm.size == 2:  # a + b is b + a
            assert curve == train(dtype, 2, None)


def case_embedding_of_pixels_in_a_sharded_table(comm: Any) -> None:
    """Each pixel that is on adds its row of a table: the same model with sparse gradients."""
    x, y = digits(np.float64)
    on = x > 0.5
    opt, single = RMSprop(0.05), RMSprop(0.05)
    table, whole = ShardedTable(64, 10, np.float64, comm=comm), np.zeros((64, 10))

    def grads(examples: np.ndarray, rows: np.ndarray, ids: np.ndarray, of: np.ndarray) -> IndexedSlices:
        logits = np.zeros((len(examples), 10))
        np.add.at(logits, of, rows)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        error = (p / p.sum(axis=1, keepdims=True) - y[examples]) / len(examples)
        return IndexedSlices(error[of], ids)

    for step in range(10):
        parts = np.split(np.arange(step * BATCH, (step + 1) * BATCH), comm.size)
        pixels = [np.nonzero(on[part]) for part in parts]
        of, ids = pixels[comm.rank]
        table.apply(opt, grads(parts[comm.rank], table.gather(ids), ids, of))
        alone = [grads(part, whole[ids], ids, of) for part, (of, ids) in zip(parts, pixels)]
        values = np.concatenate([each.values for each in alone]) / comm.size
        single.apply_gradients([(IndexedSlices(values, np.concatenate([each.indices for each in alone])), whole)])
    assert table.gather(np.arange(64)).tobytes() == whole.tobytes()
    assert np.abs(whole).max() > 0.1
