"""Fixtures shared by all tests."""

from __future__ import annotations

import os

# Engines and the oracle run on random weights; nothing is ever to be downloaded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
