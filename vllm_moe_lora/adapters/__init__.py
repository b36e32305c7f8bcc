"""What trainers write, as one canonical form: read, recognised, every tensor accounted for.

Knows tensors and names; imports neither vLLM nor Triton. Newcomer's path: `names` (what one tensor
is), `group` (which belong together), `config` (scale), `flat` and `stacked` (the families of
layouts), `canonical` (what all of them become).
"""
