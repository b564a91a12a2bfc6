"""What pytest looks for doctests in: modules that import an optional library only where it is installed."""

import importlib.util

NEEDS_CUPY = (
    "cupy_rules.py",
    "device.py",
    "kernels/cuda.py",
    "kernels/cuda_norm.py",
    "kernels/cuda_rows.py",
    "kernels/launch.py",
)
collect_ignore = [] if importlib.util.find_spec("cupy") else [f"gpurms/{name}" for name in NEEDS_CUPY]
if importlib.util.find_spec("torch") is None:
    collect_ignore.append("gpurms/torch")
