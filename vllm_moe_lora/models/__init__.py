"""MoE model classes of vLLM that declare no LoRA, or declare it with incomplete data.

`rows.py` is the table: a `row.Row` for each class and range of releases. `declare.py` gives a
loaded model what its class does not declare. `hashes.py` has the sources that the rows were written
for; `ci/record_hashes.py` writes it.
"""
