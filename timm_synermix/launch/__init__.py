"""The launcher: somebody's own timm script, as it is, with SynerMix.

`launcher` loads the script, adds the flags to its parser, and calls its `main()`. When they are given, a `Session` puts
others in the place of the names of timm that the script uses: `training` for both structures, `task_training` and
`loss_training` for what each has of its own, and `evaluation` for the metrics.
"""
