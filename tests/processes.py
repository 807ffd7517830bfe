"""Processes for tests. They are forked from a server that has imported the package once, and so start at once.

Windows cannot fork: there each of them imports it anew.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

_context = multiprocessing.get_context('spawn' if sys.platform == 'win32' else 'forkserver')
_context.set_forkserver_preload(['train', 'timm_synermix.metrics', 'timm_synermix.report'])


def start(work: Callable, *args: object, log: Path, **env: str) -> BaseProcess:
    """Start work(*args) in a process group of its own, with its output in a file."""
    process = _context.Process(target=_run, args=(work, args, {**os.environ, **env}, str(log)))
    process.start()
    return process


def _run(work: Callable, args: tuple, env: dict[str, str], log: str) -> None:
    if hasattr(os, 'setsid'):
        os.setsid()
    os.environ.clear()
    os.environ.update(env)
    with open(log, 'ab', buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if the tests run in the background
    if sys.platform == 'linux':  # workers of its own are forked, as those of a process that nothing has forked
        multiprocessing.set_start_method('fork', force=True)
    work(*args)


def run_script(path: Path | str, *argv: object) -> None:
    """`python path argv`, as the work of a process."""
    sys.argv = [str(path), *map(str, argv)]
    runpy.run_path(str(path), run_name='__main__')


def start_ranks(work: Callable, *args: object, folder: Path, world_size: int = 2, **env: str) -> list[BaseProcess]:
    """Start work(*args) in the processes of one run, with what a launcher tells them; logs are `folder/rankN.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    env |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    env |= dict(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    return [
        start(work, *args, log=folder / f'rank{rank}.log', RANK=str(rank), LOCAL_RANK=str(rank), **env)
        for rank in range(world_size)
    ]


def run_ranks(work: Callable, *args: object, folder: Path, world_size: int = 2, timeout: float = 120) -> None:
    """work(*args) in the processes of one run, all of which must succeed."""
    processes = start_ranks(work, *args, folder=folder, world_size=world_size)
    try:
        for rank, process in enumerate(processes):
            process.join(timeout)
            text = (folder / f'rank{rank}.log').read_text()
            assert process.exitcode == 0, f'rank {rank}: {process.exitcode}\n{text[-3000:]}'
    finally:
        for process in processes:
            process.kill()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]
