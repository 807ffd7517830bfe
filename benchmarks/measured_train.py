#!/usr/bin/env python3
"""train.py, which at its end writes the most memory it needed.

python benchmarks/measured_train.py MEMORY.json FLAGS OF TRAIN.PY
"""

import json
import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from timm_synermix import entry


def main() -> None:
    result = Path(sys.argv.pop(1))
    entry.run(train)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    device = torch.cuda.max_memory_reserved() / 2**20 if torch.cuda.is_initialized() else None
    result.write_text(json.dumps({'memory_mb': host if device is None else device}), encoding='utf-8')


if __name__ == '__main__':
    main()
