"""These tests need a process of their own: ../test_triton_interpreted.py starts it."""

from __future__ import annotations

import os

collect_ignore_glob = ["*"]
if os.environ.get("TRITON_INTERPRET") == "1":
    import bf16_exact  # noqa: F401  without it the interpreter is wrong in bf16

    collect_ignore_glob = []
