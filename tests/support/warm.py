"""Programs in Python whose imports have been done, which take 2 to 5 seconds of CPU time each time.

Each is a fork of warm_server.py, which a test process starts once. What a program does before it
imports torch is what another test of the same command sees: one that starts an interpreter.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = Path(__file__).with_name("warm_server.py")
# In every such process: it reads them when it starts.
THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}


@functools.cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **THREADS},
    )  # fmt: skip
    # It ends with its input.
    atexit.register(server.communicate)
    return server


def run(*arguments: object, **streams: str | None) -> subprocess.CompletedProcess:
    """Runs `python *arguments`; returns its output and its status.

    Args:
        arguments: a path, `-c` and source, or `-m` and a module, then those of the program.
        streams: for stdin, stdout or stderr the path of a file, or None if it is closed. What is
            printed there is not returned.
    """
    with tempfile.TemporaryDirectory() as folder:
        texts = {name: Path(folder, name) for name in ("stdout", "stderr")}
        for path in texts.values():
            path.touch()
        opened = {"stdin": os.devnull, **{name: str(path) for name, path in texts.items()}}
        request = {
            "arguments": [str(each) for each in arguments],
            "cwd": os.getcwd(),
            "env": dict(os.environ) | THREADS,
            "streams": opened | streams,
        }
        server = _server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(
            request["arguments"], status, *(path.read_text() for path in texts.values())
        )
