"""The hooks into vLLM: which of its functions are replaced, by what, and why.

There is one file for each file of vLLM that is changed. It has the file's name, prefixed by its
folder, and defines `HOOKS`. Each function `_name(original)` returns the replacement. It is short:
the work is done by the packages `layers`, `fitting`, `loading`, `rl` and `targets`.
"""

from __future__ import annotations

import importlib
import pkgutil

from ..patching import Hook


def all_hooks() -> list[Hook]:
    """Return the hooks of all files, sorted by file name. This does not import vLLM."""
    hooks: list[Hook] = []
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        hooks.extend(importlib.import_module(f"{__name__}.{module.name}").HOOKS)
    return hooks
