#!/usr/bin/env python3
"""train.py, which at its end writes the most memory it needed.

    python benchmarks/measured_train.py MEMORY.json [--unmixed] FLAGS OF TRAIN.PY

With --unmixed the clean images of SynerMix have the ordinary loss of each image, not that of their classes' mixes:
beta CE(clean images) + (1 - beta) L_inter, the control that tells what is due to the mixing. (CE is the mean over
images, L_intra that over classes; in batches of a few images a class that is nearly the same.)
"""

import json
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from timm_synermix import SynerMixTask
from timm_synermix.engine import build


class UnmixedTask(SynerMixTask):
    """SynerMix whose every 'mix' is one clean image."""

    def _draw_mix(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        image = torch.arange(len(target), device=target.device)
        return image, torch.ones_like(image, dtype=torch.float32), target, None


def main() -> None:
    result = Path(sys.argv.pop(1))
    if '--unmixed' in sys.argv:
        sys.argv.remove('--unmixed')
        build.SynerMixTask = UnmixedTask
    train.main()
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    device = torch.cuda.max_memory_reserved() / 2**20 if torch.cuda.is_initialized() else None
    result.write_text(json.dumps({'memory_mb': host if device is None else device}))


if __name__ == '__main__':
    main()
