"""The plugin as patches to vLLM's own tree, made from the same hooks and payload.

`closure` finds the payload that a feature needs, `weave` puts seams into a file's text, `series`
joins both to one patch for each feature, `mail` prints them for git, `tree` says how a tree
stands, `write` changes it all or not at all. Nothing of vLLM is imported or run.
"""
