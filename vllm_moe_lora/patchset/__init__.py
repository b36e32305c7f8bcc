"""Makes the plugin's changes as patches to vLLM's own source files.

The patches are for people who build vLLM themselves and do not want a plugin. They are made from
the same hooks, one patch for each feature. A patch does two things. It copies files of this package
into the folder vllm/lora/moe_lora, and it adds the decorator `seam` (see seams.py) above each
function that a hook replaces. The command `vllm-moe-lora patches` applies and reverts them.

`closure` finds the files of this package that a feature needs. `weave` adds seams to the text of a
file. `series` makes the patches of a release from both, and `mail` prints them in git's format.
`tree` finds out which patches a tree of vLLM's files has, `change` applies and reverts them,
`export` writes them into a folder for `git am`, and `write` writes files, all or none. vLLM is
never imported or run.
"""
