"""The mixing operator against a loop over the classes, and against a copy of the features."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import naive
import torch
from measuring import Row, compare, in_turn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from timm_synermix import intra_class_mix

# batch, features, classes, and how many times as fast as the loop it should be
SHAPES = [(164, 512, 100, 25), (256, 2048, 1000, 50), (1024, 2048, 1000, 150)]


def rows(device: torch.device, quick: bool) -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table = [row for shape in SHAPES for row in shape_rows(*shape, device, quick)]
    torch.set_num_threads(threads)
    few, many = (count_operators(C, device) for C in (10, 1000))
    return [
        *table,
        Row('operators of 1000 classes', 'B 1024', '10 classes', *[many / few] * 3, '1', f'{many} operators'),
    ]


def shape_rows(B: int, D: int, C: int, aim: int, device: torch.device, quick: bool) -> list[Row]:
    torch.manual_seed(0)
    target = torch.randint(C, (B,), device=device)
    feature = torch.randn(B, D, device=device, requires_grad=True)
    gradient = torch.randn(B, D, device=device)

    def often(mix: Callable[[], Tensor], count: int) -> Callable[[], int]:
        def run() -> int:
            for _ in range(count):
                mixed = mix()
                mixed.backward(gradient[: len(mixed)])
                feature.grad = None
            return count

        return run

    repeats = 20 if quick else 100
    functions = {
        'ours': often(lambda: intra_class_mix(feature, target)[0], repeats),
        'loop': often(lambda: naive.mix(feature, target)[0], 2),
        'copy': often(feature.clone, repeats),
    }
    seconds = in_turn(functions, 5 if quick else 15, device)
    setting = f'B {B}, D {D}, C {C}, forward and backward, one thread'
    return [
        compare('loop over classes', setting, 'intra_class_mix', seconds['loop'], seconds['ours'], f'≥ {aim}'),
        compare('intra_class_mix', setting, 'copy of the features', seconds['ours'], seconds['copy'], '≤ 3'),
    ]


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_operators(num_classes: int, device: torch.device) -> int:
    """Operators that the forward and backward of the mix call; none of them may wait for the device."""
    feature = torch.randn(1024, 64, device=device, requires_grad=True)
    target = torch.randint(num_classes, (1024,), device=device)
    with _Counting() as mode:
        intra_class_mix(feature, target)[0].sum().backward()
    assert not {name for name in mode.count if 'item' in name or 'local_scalar' in name or 'nonzero' in name}
    return sum(mode.count.values())
