"""Two processes of one training, with the environment that torchrun gives them, but without the process of torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def run_two(*words: object) -> None:
    """Run a Python script with arguments in two processes that form a group, and expect both to end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in started:
            _, said = process.communicate(timeout=200)
            assert process.returncode == 0, said[-2000:]
    finally:
        for process in started:
            process.kill()
