"""The launcher: somebody's own timm script, as it is, with SynerMix.

`launcher` loads the script, adds the flags to its parser, and calls its `main()`; when they are given, `Session` puts
`training` and `evaluation` in the place of the names of timm that the script uses.
"""
