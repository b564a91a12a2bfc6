"""RMSprop one number at a time: the reference that the tests compare with.

Independent of the library: plain Python, with NumPy only to take arrays apart and put them together. The
arithmetic is that of `number`: `float` is the float64 reference; `np.float32` and `np.float64` execute each
line as single IEEE operations of a compute type, for comparing bits after `stored` has rounded them.
"""

import math
from itertools import chain
from types import SimpleNamespace

import numpy as np

DEFAULTS = {
    "learning_rate": 0.001,
    "rho": 0.9,
    "momentum": 0.0,
    "epsilon": 1e-7,
    "centered": False,
    "clipvalue": None,
    "clipnorm": None,
    "global_clipnorm": None,
    "weight_decay": None,
    "decoupled_weight_decay": True,
    "eps_in_sqrt": True,
    "lr_in_momentum": True,
    "nesterov": False,
    "maximize": False,
    "initial_accumulator_value": 0.0,
}
SLOTS = ("rms", "momentum", "mg")
FAN_IN = 32
# bits of the significand, exponent of the smallest number, first number that is infinity
FORMATS = {
    "float16": (11, -24, 2.0**16),
    "bfloat16": (8, -133, 2.0**128),
    "float32": (24, -149, 2.0**128),
}


def scalars(number, **options):
    """The options of a step, its numbers formed in float64 and rounded once to `number`."""
    o = SimpleNamespace(**{**DEFAULTS, **options})
    weight_decay = o.weight_decay or 0.0
    return SimpleNamespace(
        **{
            **vars(o),
            "number": number,
            "sqrt": math.sqrt if number is float else np.sqrt,
            "lr": number(o.learning_rate),
            "one_minus_rho": number(1.0 - o.rho),
            "momentum": number(o.momentum),
            "epsilon": number(o.epsilon),
            "weight_decay": number(weight_decay),
            "lr_weight_decay": number(o.learning_rate * weight_decay),
            "clipvalue": None if o.clipvalue is None else number(o.clipvalue),
        }
    )


def update(s, g, var, rms, momentum, mg):
    """One element. `momentum` is None without a momentum slot, `mg` unless centered."""
    mom = momentum
    if s.maximize:
        g = -g
    if s.weight_decay and not s.decoupled_weight_decay:
        g = g + s.weight_decay * var
    if s.weight_decay and s.decoupled_weight_decay:
        var = var - s.lr_weight_decay * var
    rms = rms + (g * g - rms) * s.one_minus_rho
    d = rms
    if s.centered:
        mg = mg + (g - mg) * s.one_minus_rho
        d = rms - mg * mg
        if d < 0:
            d = s.number(0)
    den = s.sqrt(d + s.epsilon) if s.eps_in_sqrt else s.sqrt(d) + s.epsilon
    u = (s.lr * g) / den if s.lr_in_momentum else g / den
    step = u
    if mom is not None:
        mom = s.momentum * mom + u
        step = s.momentum * mom + u if s.nesterov else mom
    if not s.lr_in_momentum:
        step = s.lr * step
    var = var - step
    return {"var": var, "rms": rms, "momentum": mom, "mg": mg}


def tree_sum(values):
    """Sum of runs of up to 32, each from left to right, then of those sums 32 at a time, and so on."""
    while len(values) > 1:
        values = [left_to_right(values[k : k + FAN_IN]) for k in range(0, len(values), FAN_IN)]
    return values[0]


def left_to_right(values):
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def limited(s, g):
    """One gradient element within [-clipvalue, clipvalue]; NaN stays."""
    if s.clipvalue is not None and g > s.clipvalue:
        return s.clipvalue
    if s.clipvalue is not None and g < -s.clipvalue:
        return -s.clipvalue
    return g


def clip_factors(s, grads):
    """One factor per gradient array (the `values` of a sparse one), or None each; norms after `clipvalue`."""
    limit = s.clipnorm if s.global_clipnorm is None else s.global_clipnorm
    if limit is None:
        return [None] * len(grads)
    squares = [[float(limited(s, s.number(g))) ** 2 for g in grad.ravel().tolist()] for grad in grads]
    if s.global_clipnorm is not None:
        squares = [list(chain.from_iterable(squares))] * len(grads)
    norms = [math.sqrt(math.fsum(terms)) for terms in squares]
    return [s.number(1.0 if norm <= limit else limit / norm) for norm in norms]


def clipped(s, g, factor):
    """One gradient element in the compute type, clipped."""
    g = limited(s, s.number(g))
    return g if factor is None else g * factor


def dense(s, var, grad, slots, factor=None, at=None):
    """One update of a variable: new values by name, flat, of the elements numbered `at` (None: all).

    `slots` maps "rms" and, where they exist, "momentum" and "mg" to arrays of the variable's shape.
    """
    state = {"var": var, **slots}
    new = [
        update(s, g=clipped(s, grad.flat[i], factor), **element(s, state, i))
        for i in (range(var.size) if at is None else at)
    ]
    return {name: np.array([x[name] for x in new], dtype=s.number) for name in state}


def sparse(s, var, values, indices, slots, factor=None, columns=None):
    """One update of the rows named by `indices`: those rows, rising, and their new values by name.

    The values have shape (number of rows, number of columns); `columns` of the flattened rows, None for all.
    """
    state = {"var": var, **slots}
    row_size = math.prod(var.shape[1:])
    columns = range(row_size) if columns is None else columns
    values = values.reshape(len(indices), row_size)
    occurrences = {}
    for position, row in enumerate(indices.tolist()):
        occurrences.setdefault(row, []).append(position)
    rows = sorted(occurrences)
    new = []
    for row in rows:
        for column in columns:
            g = tree_sum([clipped(s, values[position, column], factor) for position in occurrences[row]])
            new.append(update(s, g=g, **element(s, state, row * row_size + column)))
    shape = len(rows), len(columns)
    return rows, {name: np.array([x[name] for x in new], dtype=s.number).reshape(shape) for name in state}


def element(s, state, i):
    """Element `i` of a variable and its slots, None for a slot that does not exist."""
    return {name: s.number(state[name].flat[i]) if name in state else None for name in ("var", *SLOTS)}


def stored(x, dtype):
    """Numbers rounded once, to nearest even, to a storage type."""
    out = np.empty(np.shape(x), dtype)
    if out.dtype.name not in FORMATS:
        out[...] = x
        return out
    for i, value in enumerate(np.ravel(x).tolist()):
        out.flat[i] = _rounded(value, *FORMATS[out.dtype.name])
    return out


def _rounded(x, bits, lowest, overflow):
    if not math.isfinite(x):
        return x
    quantum = math.ldexp(1.0, max(math.frexp(x)[1] - bits, lowest))
    y = math.copysign(round(x / quantum) * quantum, x)
    return y if abs(y) < overflow else math.copysign(math.inf, x)
