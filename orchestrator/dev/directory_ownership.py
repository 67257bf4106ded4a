"""One owner for a server's directory, and a guard that cleans up after an owner who was killed.

Whoever holds the directory's lock owns the server: starts it, and stops it at exit. The guard is a small
shell beside the server, reading from a pipe whose only other end the owner holds: when the owner dies in
any way, SIGKILL included, the guard reads end-of-file, stops the server, and removes the directory if it
was temporary. (The kernel's parent-death signal would not do: it fires when the *thread* that started the
child ends.) The guard holds a lock too until it is done, for which the next owner waits.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

from orchestrator.dev.operating_system import until
from orchestrator.errors import OrchestratorError

# The process id in the file may be stale and another program's by now: where it can be checked, it is.
# The server's last act is to remove that file; as an orphan it may then stay a zombie for long. An initdb that was
# under way writes until it misses its files.
_GUARD = """
read -r word && exit
pid=$(head -n 1 "$1/cluster/postmaster.pid" 2>/dev/null)
if [ -d /proc/self ] && ! grep -qF "$1/cluster" "/proc/$pid/cmdline" 2>/dev/null; then pid=; fi
if [ -n "$pid" ] && kill -"$2" "$pid" 2>/dev/null; then
    while [ -e "$1/cluster/postmaster.pid" ] && kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
fi
if [ "$3" = remove ]; then
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        rm -rf -- "$1"
        [ -e "$1" ] || break
        sleep 0.2
    done
fi
"""


class DirectoryOwnership:
    """The right to start and stop the server of `directory`; it ends with `give_up`, or with this process."""

    def __init__(self, directory: Path, *, temporary: bool) -> None:
        self._directory = directory
        self._temporary = temporary
        self._locks: list[int] = []
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def held(self) -> bool:
        return bool(self._locks)

    @property
    def locks(self) -> tuple[int, ...]:
        """Descriptors of the lock: a child that inherits them holds it too, until the child ends."""
        return tuple(self._locks)

    def take(self, timeout_s: float) -> bool:
        """Takes it unless another process has it; True when this process holds it.

        Waits for the guard of an owner who was killed, which may still be stopping the server. Raises
        OrchestratorError if the guard does not end in time.
        """
        if self.held:
            return True
        lock = self._try_lock("lock")
        if lock is None:
            return False
        guard_lock = None
        for _ in until(timeout_s):
            guard_lock = self._try_lock("guard.lock")
            if guard_lock is not None:
                break
        else:
            os.close(lock)
            raise OrchestratorError(f"{self._directory}: the server of an owner who is gone is still stopping")
        self._locks = [lock, guard_lock]
        action = ["QUIT", "remove"] if self._temporary else ["INT", "keep"]
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "orchestrator-postgres-guard", str(self._directory), *action],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[guard_lock],
            start_new_session=True,  # a Ctrl-C is for the owner, who then stops the server in an orderly way
        )
        return True

    def give_up(self) -> None:
        """Lets another process take it. The server must be down."""
        if self._guard is not None:
            self._guard.communicate(b"dismissed\n")
            self._guard = None
        while self._locks:
            os.close(self._locks.pop())

    def _try_lock(self, name: str) -> int | None:
        descriptor = os.open(self._directory / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor
