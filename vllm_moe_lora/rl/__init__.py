"""What a reinforcement-learning loop needs: adapters and base weights from memory, routes, noise.

`pushing.py` and `worker.py` bring an adapter from a trainer's memory into a running engine;
`base_weights.py` keeps loaded adapters when the base model's weights are loaded again. `routes.py`
captures which experts each token took, and `convert_routes.py` writes that as trainers read it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pushing import push as push
    from .worker import Worker as Worker

_EXPORTS = {"push": "pushing", "Worker": "worker"}  # name -> module


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
