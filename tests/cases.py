"""Tables of cases: every option of the rule, every kind of shape, type and memory layout."""

import numpy as np

RULES = {
    "default": {},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True},
    "centered-momentum": {"centered": True, "momentum": 0.9, "rho": 0.95},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "l2": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "decoupled": {"weight_decay": 0.1},
    "eps-outside": {"eps_in_sqrt": False, "epsilon": 1e-3},
    "lr-outside": {"momentum": 0.9, "lr_in_momentum": False},
    "maximize": {"maximize": True},
    "clipvalue": {"clipvalue": 0.75},
    "clipnorm": {"clipnorm": 1.5},
    "global-clipnorm": {"global_clipnorm": 2.5},
    "warm-start": {"initial_accumulator_value": 0.3, "rho": 0.5},
    "large-epsilon": {"centered": True, "epsilon": 10.0},
    "everything": {
        "rho": 0.8,
        "momentum": 0.7,
        "epsilon": 0.01,
        "centered": True,
        "clipvalue": 1.25,
        "clipnorm": 2.0,
        "weight_decay": 0.05,
        "decoupled_weight_decay": False,
        "eps_in_sqrt": False,
        "lr_in_momentum": False,
        "nesterov": True,
        "maximize": True,
        "initial_accumulator_value": 0.3,
    },
}
LEARNING_RATES = (0.1, 0.03, 0.2)  # of successive steps

SHAPES = ((), (0,), (3, 0, 2), (1,), (7,), (33, 5), (2, 3, 4, 5))
LARGE = (600_011,)  # several blocks, more than one unit of work for the threads, ragged
LARGE_EMULATED = (70_011,)  # several tiles and chunks of the CUDA kernels, ragged

TABLES = {  # shape, ids
    "1-d": ((10,), [3, 3, 0, 9, 3, 0]),
    "distinct": ((6, 3), [4, 0, 5]),
    "one column": ((5, 1), [2] * 7 + [4]),
    "3-d": ((9, 4, 16), [8, 1, 8, 8]),
    "wide": ((3, 5000), [2, 0, 2, 2, 2]),
    "hot": ((4, 2), [1] * 33 + [3] * 32 + [0] * 65 + [2]),
    "hotter": ((3, 1), [0] * 1100 + [2] * 1024),
    "tall": ((70_000, 1), [69_999, 5, 65_536, 5, 0, 2048]),
    "no ids": ((5, 3), []),
    "no rows": ((0, 3), []),
    "empty rows": ((4, 0), [1, 1, 3]),
}
HOTTEST = ((3, 1), [1] * (32**3 + 33) + [2])  # four levels of sums by 32


def sample(n):
    """Numbers below n to look at: all if they are few, else the ends and both sides of each power of two."""
    if n <= 200:
        return np.arange(n)
    powers = 2 ** np.arange(5, 20)
    near = np.concatenate([powers - 1, powers, powers + 1, [0, 1, n - 2, n - 1]])
    return np.unique(near[near < n])


def strided(x):
    """Every second row of a larger array."""
    base = np.zeros((2 * len(x), *x.shape[1:]), x.dtype)
    base[::2] = x
    return base[::2]


def transposed(x):
    """The first two axes swapped in memory: neither C nor Fortran order from three axes on."""
    return np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)


def backwards(x):
    """A negative stride."""
    return np.ascontiguousarray(x[::-1])[::-1]


def unaligned(x):
    """C order from an odd address."""
    out = np.ndarray(x.shape, x.dtype, buffer=bytearray(x.nbytes + 1), offset=1)
    out[...] = x
    return out


LAYOUTS = {
    "C": np.array,
    "F": np.asfortranarray,
    "strided": strided,
    "transposed": transposed,
    "backwards": backwards,
    "unaligned": unaligned,
}


def normal(rng, shape, dtype):
    """Full-mantissa numbers of about 1."""
    return np.array(rng.standard_normal(shape)).astype(dtype)


def eighths(rng, shape, dtype):
    """Multiples of 1/8: their squares add up without rounding, so a norm has one value in any order."""
    return (np.array(rng.integers(-24, 25, shape)) / 8).astype(dtype)


def gradients_for(options):
    """The generator of gradients under which a rule's result is one bit pattern."""
    return eighths if options.get("clipnorm") or options.get("global_clipnorm") else normal
