"""Trajectories recorded from TensorFlow, torch, optax and Keras 3, replayed through the public API.

`golden/FORMAT.md` describes the files. Each is replayed with the options that select its library's rule.
"""

import json
from collections import Counter
from pathlib import Path

import autograd.numpy as anp
import numpy as np
import pytest

import gpurms

FILES = {path.stem: path for path in sorted((Path(__file__).parent / "golden").glob("*.npz"))}
FAMILIES = {"kernel": 24, "opt": 71, "optlate": 2, "torch": 16, "optax": 16, "keras3": 9}
SLOTS = ("rms", "momentum", "mg")


def read(name):
    with np.load(FILES[name], allow_pickle=False) as z:
        return json.loads(str(z["meta"])), {key: z[key] for key in z.files if key != "meta"}


def kernel_options(hyper):
    # The fused op has a momentum accumulator even where momentum is 0, as a callable momentum has.
    return {**hyper, "momentum": hyper["momentum"] or (lambda: 0.0)}


def torch_options(hyper):
    names = {"alpha": "rho", "eps": "epsilon", "lr": "learning_rate"}
    options = {names.get(key, key): value for key, value in hyper.items()}
    return {**options, "eps_in_sqrt": False, "lr_in_momentum": False, "decoupled_weight_decay": False}


def optax_options(hyper):
    names = {"decay": "rho", "eps": "epsilon", "initial_scale": "initial_accumulator_value"}
    return {names.get(key, key): value for key, value in hyper.items()}


def make_optimizer(meta):
    """The optimizer of a run, with the options under which it follows the run's rule."""
    extra = {"slot_dtype": "float16"} if set(meta["dtypes"]) == {"float16"} else {}
    if meta["family"] == "optimizer":
        if meta["rule"] == "composed":
            extra["eps_in_sqrt"] = False
        opt = gpurms.RMSprop.from_config({**meta["config"], **extra})
        if meta["momentum_is_callable"]:
            opt.momentum = lambda: meta["config"]["momentum"]
        return opt
    options = {"kernel": kernel_options, "torch": torch_options, "optax": optax_options, "keras3": dict}
    return gpurms.RMSprop(**options[meta["family"]](meta["hyper"]), **extra)


def make_variables(meta, arrays, engine):
    limits = meta.get("constraint")
    constraint = limits and (lambda x: np.clip(x, limits["min"], limits["max"]).astype(x.dtype))
    return [
        engine.variable(arrays[f"init__var_{i}"].copy(), f"var_{i}", constraint=constraint)
        for i in range(meta["n_vars"])
    ]


def add_starting_slots(opt, variables, arrays):
    for i, variable in enumerate(variables):
        for slot in SLOTS:
            if f"init__{slot}_{i}" in arrays:
                opt.add_slot(variable, slot, initializer=arrays[f"init__{slot}_{i}"])


def gradient(arrays, i, t):
    if f"has_grad_{i}" in arrays and not arrays[f"has_grad_{i}"][t]:
        return None
    if f"grad_{i}" in arrays:
        return arrays[f"grad_{i}"][t]
    rows = slice(*arrays[f"offsets_{i}"][t : t + 2])
    return gpurms.IndexedSlices(arrays[f"values_{i}"][rows], arrays[f"indices_{i}"][rows])


def apply_events(opt, meta, t):
    for event in meta.get("events", ()):
        changes = {key: value for key, value in event.items() if key != "before_step"}
        if event["before_step"] == t:
            for key, value in changes.items():
                if key == "iterations":
                    opt.iterations.assign(value)
                else:
                    setattr(opt, key, value)


def linear_loss(grads, variables):
    """A loss whose gradients are exactly `grads`."""

    def term(grad, variable):
        if isinstance(grad, gpurms.IndexedSlices):
            return anp.sum(grad.values * gpurms.gather(variable, grad.indices))
        return anp.sum(grad * variable.value)

    return lambda: sum(term(grad, variable) for grad, variable in zip(grads, variables))


def step(opt, meta, grads, variables):
    if meta.get("clip_site") == "minimize":
        return opt.minimize(linear_loss(grads, variables), variables)
    if any(grad is None for grad in grads):
        with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
            return opt.apply_gradients(zip(grads, variables))
    return opt.apply_gradients(zip(grads, variables))


def state(opt, variables, grads_seen, arrays):
    """The state arrays under their names in the file."""
    found = {}
    for i, variable in enumerate(variables):
        found[f"var_{i}"] = variable.numpy()
        for slot in SLOTS:
            if not grads_seen[i]:
                continue
            if f"{slot}_{i}" in arrays:
                found[f"{slot}_{i}"] = opt.get_slot(variable, slot).numpy()
            if slot == "momentum" and f"trace_{i}" in arrays:
                found[f"trace_{i}"] = -opt.get_slot(variable, slot).numpy()
    return found


def error(x, ref, scale, tolerance):
    """The largest error of an array, in units of what is allowed."""
    x, ref, scale = (np.asarray(a, np.float64) for a in (x, ref, scale))
    assert x.shape == ref.shape
    allowed = tolerance["atol"] + tolerance["rtol"] * np.maximum(abs(ref), scale)
    return (abs(x - ref) / allowed).max(initial=0)


def learning_rate(opt, t):
    rate = opt.learning_rate
    rate = rate(t) if callable(rate) else rate
    return rate / (1 + opt.decay * t)


@pytest.mark.parametrize("name", FILES)
def test_trajectory(name, engine):
    meta, arrays = read(name)
    opt, variables = make_optimizer(meta), make_variables(meta, arrays, engine)
    add_starting_slots(opt, variables, arrays)
    recorded = [key for key in arrays if key.split("_")[0] in ("var", *SLOTS, "trace")]
    scale = {key: abs(arrays[key].astype(np.float64)).max(0, initial=0) for key in recorded}
    seen = [False] * len(variables)
    worst = dict.fromkeys(recorded, 0.0)

    for t in range(meta["steps"]):
        apply_events(opt, meta, t)
        before = int(opt.iterations.numpy())
        grads = [gradient(arrays, i, t) for i in range(len(variables))]
        grads = [None if grad is None else engine.put(grad) for grad in grads]
        seen = [was or grad is not None for was, grad in zip(seen, grads)]
        after = step(opt, meta, grads, variables)

        assert after == opt.iterations.numpy() == before + 1
        if "iterations" in arrays:
            assert after == arrays["iterations"][t]
            assert learning_rate(opt, before) == pytest.approx(arrays["lr"][t], rel=meta["tolerance"]["rtol"])
        found = state(opt, variables, seen, arrays)
        for key in recorded:
            if key in found:
                worst[key] = np.maximum(
                    worst[key], error(found[key], arrays[key][t], scale[key], meta["tolerance"])
                )  # keeps NaN
            else:
                assert not arrays[key][t].any(), f"{key} does not exist before the first gradient"

    assert {key: value for key, value in worst.items() if not value <= 1} == {}
    if "weights_names" in meta:
        check_weights(opt, meta, arrays, scale)


def check_weights(opt, meta, arrays, scale):
    weights = opt.get_weights()
    assert len(weights) == len(meta["weights_names"])
    for k, (weight, name) in enumerate(zip(weights, meta["weights_names"])):
        ref = arrays[f"weights_{k:03}"]
        if name == "iter":
            assert weight == ref
            continue
        variable, slot = name.split("/")
        key = f"{slot}_{variable.removeprefix('var_')}"
        assert error(weight, ref, scale[key], meta["tolerance"]) <= 1, name


def test_every_family_is_there():
    assert Counter(name.split("_")[0] for name in FILES) == FAMILIES
    assert all(read(name)[0]["name"] == name for name in FILES)
