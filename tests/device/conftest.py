"""Without CuPy there is no emulated device to collect doctests from."""

import importlib.util

if importlib.util.find_spec("cupy") is None:
    collect_ignore_glob = ["*.py"]
