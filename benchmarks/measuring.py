"""How things are measured: in turn, as ratios; memory in a process of its own."""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil
import torch


class Row(NamedTuple):
    """A line of the table: what, in which setting, as a multiple of what; the median and the range over the rounds."""

    what: str
    setting: str
    against: str
    ratio: float
    low: float
    high: float
    aim: str = ''
    note: str = ''


def in_turn(
    functions: dict[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each function in each round; the functions take turns, so that a busy machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + rounds):
        for name, function in functions.items():
            synchronise(device)
            start = clock()
            count = function()
            synchronise(device)
            if number >= warmup:  # a function that returns a number does that many things at once
                seconds[name].append((clock() - start) / (count or 1))
    return seconds


def workers_time() -> float:
    """Seconds of the processor that the workers of this process have had."""
    times = [child.cpu_times() for child in psutil.Process().children()]
    return sum(spent.user + spent.system for spent in times)


def synchronise(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def compare(
    what: str, setting: str, against: str, a: list[float], b: list[float], aim: str = '', note: str = ''
) -> Row:
    """The ratio a / b, round by round."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return Row(what, setting, against, statistics.median(ratios), min(ratios), max(ratios), aim, note)


def in_process(function: Callable[..., Any], *args: Any, limit: float | None = None) -> Any:
    """What a function returns in a fresh process.

    Raises:
        EOFError: It returns nothing: it failed.
        TimeoutError: It takes longer than limit seconds.
    """
    os.environ['MALLOC_MMAP_THRESHOLD_'] = '65536'  # glibc gives freed memory back at once
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            process.kill()
            raise TimeoutError(f'above {limit:.0f} s')
        return receiver.recv()
    finally:
        process.join()


def _send(sender: Any, function: Callable[..., Any], args: tuple) -> None:
    sender.send(function(*args))


def peak_memory(function: Callable[..., None], *args: Any) -> float:
    """MB that a function needs at the most, in a fresh process: of the GPU if it uses one, else of the machine."""
    peak: float = in_process(_peak, function, args)
    return peak


def _peak(function: Callable[..., None], args: tuple) -> float:
    torch.set_num_threads(1)
    before = memory_mb('VmRSS')
    function(*args)
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    return memory_mb('VmHWM') - before


def memory_mb(name: str) -> float:
    """Of this process: 'VmRSS' now, 'VmHWM' at the most (getrusage would give the peak of the parent, if larger)."""
    with open('/proc/self/status', encoding='utf-8') as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name))
