"""``python -m gpurms info``: what is installed, and which engine would run, and why not another."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import NamedTuple

import gpurms
from gpurms import backend
from gpurms.kernels import pool

SUMMARY = "show versions, and which engine would run and why not another"
PACKAGES = {
    "NumPy": ("numpy",),
    "autograd": ("autograd",),
    "Numba": ("numba",),
    "ml_dtypes": ("ml_dtypes",),
    "CuPy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "torch": ("torch",),
}
"""Names of the distributions that bring each package."""

Rows = list[tuple[str, str]]


class Engine(NamedTuple):
    """An engine, whether it can run for arrays of ``array_module()``, and why not or with what."""

    name: str
    usable: bool
    detail: str


def engines() -> list[Engine]:
    """All engines, the preferred first."""
    asked = os.environ.get("GPURMS_BACKEND") or "auto"
    rows = []
    for name, usable, detail in backend.report():
        library = "cupy" if name == "cuda" else "numpy"
        if usable and asked not in ("auto", library):
            usable, detail = False, f"GPURMS_BACKEND={asked}"
        rows.append(Engine(name, usable, detail))
    return rows


def engine() -> Engine:
    """The engine that runs for arrays of ``array_module()``; RuntimeError if none can."""
    found = engines()
    for row in found:
        if row.usable:
            return row
    raise RuntimeError("no engine can run: " + "; ".join(f"{row.name}: {row.detail}" for row in found))


def report() -> str:
    """The report as text: three aligned tables."""
    tables = (("system", _system()), ("packages", _packages()), ("engines", _choices()))
    width = max(len(name) for _, rows in tables for name, _ in rows)
    blocks = [[title, *(f"  {name:{width}}  {value}" for name, value in rows)] for title, rows in tables]
    return "\n\n".join("\n".join(block) for block in blocks)


def _system() -> Rows:
    return [
        ("gpurms", gpurms.__version__),
        ("Python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("platform", platform.platform()),
        ("cores", f"{os.cpu_count()}, of which this process may use {pool.n_threads()}"),
    ]


def _packages() -> Rows:
    return [(name, _version(distributions)) for name, distributions in PACKAGES.items()]


def _version(distributions: tuple[str, ...]) -> str:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def _choices() -> Rows:
    rows = [(name, os.environ.get(name) or "not set") for name in ("GPURMS_BACKEND", "GPURMS_ENGINE")]
    try:
        rows.append(("array_module()", gpurms.array_module().__name__))
    except (RuntimeError, ValueError) as error:
        rows.append(("array_module()", f"raises {type(error).__name__}: {error}"))
    found = engines()
    running = next((row.name for row in found if row.usable), "none")
    rows.append(("engine", running))
    for row in found:
        if row.name == running:
            rows.append((row.name, f"runs, with {row.detail}"))
        elif row.usable:
            rows.append((row.name, f"not chosen: {running} comes first"))
        else:
            rows.append((row.name, f"not chosen: {row.detail}"))
    return rows
