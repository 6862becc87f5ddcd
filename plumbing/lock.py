"""One process at a time in a folder. The system releases the lock when its owner ends, however it ends."""

import os
import socket
import time
from pathlib import Path

try:
    from fcntl import LOCK_EX, LOCK_NB, flock

    def take(file):
        flock(file, LOCK_EX | LOCK_NB)
except ImportError:  # Windows, where a locked byte cannot be read: one far behind the text
    import msvcrt

    def take(file):
        file.seek(2**20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

HELD = {}  # file -> its handle: a lock belongs to the process, and outlives a call


def hold(folder: Path):
    """Lock a folder for the rest of this process. Raises ValueError that says who has it; where a file system
    knows no locks, says so and goes on."""
    path = (folder / ".lock").resolve()
    if path in HELD:  # a second call in this process
        HELD.pop(path).close()
    file = open(path, "a+", encoding="utf-8")
    try:
        take(file)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        who = file.read().strip() or "another process"
        file.close()
        raise ValueError(f"{folder} is in use by {who}: let it end, or stop it, or give another --out"
                         ) from None
    except OSError as error:
        print(f"note: {folder}: its file system has no locks ({error.strerror}); "
              "start one process at a time there")
    file.seek(0)
    file.truncate()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    file.flush()
    HELD[path] = file
