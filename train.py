#!/usr/bin/env python3
"""The door to timm_synermix/train.py, where the script is: `python train.py --help` lists its flags."""

import sys

from timm_synermix import entry

if __name__ == '__main__':
    entry.train()
else:  # `import train` is that module itself, whose names a caller may replace
    sys.modules[__name__] = entry.module('train')
