"""What an engine child on a patched tree runs: no plugin is there, and it says where vLLM is."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    place = Path(os.environ["MOE_LORA_ENGINE"])
    spec = importlib.util.spec_from_file_location("engine", place)
    engine = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["engine"] = engine
    spec.loader.exec_module(engine)
    engine.main(*sys.argv[1:])
    import vllm

    print("PATCHED", vllm.__file__, "vllm_moe_lora" in sys.modules, flush=True)
