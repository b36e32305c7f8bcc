"""data_parallel.py with EPLB, by balanced.py."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import balanced  # noqa: F401 -- EPLB on a CPU
import data_parallel
import gloo

if __name__ == "__main__":
    gloo.install()
    asyncio.run(data_parallel.main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
