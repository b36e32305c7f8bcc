"""What a reinforcement-learning loop needs: adapters and base weights from memory, routes, noise.

`pushing.py` and `worker.py` bring an adapter from a trainer's memory into a running engine;
`base_weights.py` keeps loaded adapters when the base model's weights are loaded again.
`routes.py` returns the experts that tokens took, `convert_routes.py` writes them as trainers read
them, and `replay.py` takes routes from a request. `noise.py` puts QeRL's noise on norm weights.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .noise import clear_noise as clear_noise
    from .noise import set_noise as set_noise
    from .pushing import push as push
    from .worker import Worker as Worker

_EXPORTS = {
    "push": "pushing",
    "Worker": "worker",
    "set_noise": "noise",
    "clear_noise": "noise",
}  # name -> module


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
