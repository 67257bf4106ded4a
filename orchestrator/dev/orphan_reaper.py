"""Ends processes whose owner was killed and could not end them itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

# Dismissed, it does nothing; left alone, it reads end-of-file once the owner is gone.
_SCRIPT = """
read -r word && exit
pid=$1
kill -TERM "$pid" 2>/dev/null
for _ in 1 2 3 4 5; do kill -0 "$pid" 2>/dev/null || break; sleep 1; done
kill -KILL "$pid" 2>/dev/null
if [ -n "$2" ]; then rm -rf -- "$2"; fi
"""


class OrphanReaper:
    """A small shell beside a process. It ends the process, and removes `directory`, when this process is gone."""

    def __init__(self, pid: int, directory: Path | None = None) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "orchestrator-reaper", str(pid), str(directory or "")],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is for the owner, who then ends the process in an orderly way
        )

    def dismiss(self) -> None:
        """To be called once the process has ended."""
        self._shell.communicate(b"dismissed\n")
