#!/usr/bin/env python3
"""The door to timm_synermix/validate.py, where the script is: `python validate.py --help` lists its flags."""

import sys

from timm_synermix import entry

if __name__ == '__main__':
    entry.validate()
else:  # `import validate` is that module itself, whose names a caller may replace
    sys.modules[__name__] = entry.module('validate')
