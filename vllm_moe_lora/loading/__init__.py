"""Decides when an adapter is loaded, and keeps a bad or slow adapter away from other requests.

`front_end.py` runs in the engine's front end: it knows which adapters the workers hold, and has an
adapter loaded before its request is scheduled. `admit.py` performs such a load: it makes room and
waits for requests in flight. `background.py` runs in the worker and reads and stages adapters in a
thread. In a data-parallel group `slots.py` gives out the slots of all ranks, and `assigned.py`
carries that out in the workers.
"""
