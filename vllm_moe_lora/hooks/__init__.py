"""One file per upstream file touched, named after it; each holds its `HOOKS`."""

from __future__ import annotations

import importlib
import pkgutil

from ..patching import Hook


def all_hooks() -> list[Hook]:
    """Every hook of the package, by file name. Imports nothing of vLLM's."""
    hooks: list[Hook] = []
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        hooks.extend(importlib.import_module(f"{__name__}.{module.name}").HOOKS)
    return hooks
