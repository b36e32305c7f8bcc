"""What the commands do with an adapter's folder, without an engine.

`convert.py` reads a whole adapter and writes it in another layout, `merge.py` merges it into a
full-precision checkpoint, `check.py` says whether it will load on a model.
"""
