"""A command that ends with the process that started it, however that ends: what is killed cannot end its children.

Linux sends the signal of prctl(PR_SET_PDEATHSIG) to a child whose parent is gone. This file runs itself as a small program that asks for
it and then becomes the command, so that nothing has to run between a fork and its exec.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1


def bound(command: Sequence[str]) -> list[str]:
    """``command`` as one that ends with this process; elsewhere than on Linux the command itself."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", str(Path(__file__)), str(os.getpid()), *command]


def become(parent: int, command: Sequence[str]) -> None:
    """Does not return."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before anybody could ask
        sys.exit(128 + signal.SIGKILL)
    os.execvp(command[0], list(command))


if __name__ == "__main__":
    become(int(sys.argv[1]), sys.argv[2:])
