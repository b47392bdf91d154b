"""Runs programs in forks of a process that has imported what they import.

A line of standard input is a request, and a line of standard output the status of the program:
tests/support/warm.py. A fork has its own modules from then on, memory and descriptors; only the
imports, which take seconds, are done.
"""

import atexit
import gc
import json
import os
import runpy
import sys

import torch  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import baton_engines
import baton_engines.cli.main
import baton_engines.huggingface  # noqa: F401
from baton_engines.testing import small_llama  # noqa: F401


def become(request: dict) -> None:
    """Runs the program in the fork; it ends like any other program."""
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for descriptor, (name, path) in enumerate(request["streams"].items()):
        if path is None:  # what Python makes of a closed one
            os.close(descriptor)
            setattr(sys, name, None)
        else:
            opened = os.open(path, os.O_WRONLY if descriptor else os.O_RDONLY)
            os.dup2(opened, descriptor)
            os.close(opened)
    first, *rest = sys.argv = request["arguments"]
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv, sys.path[0] = rest, request["cwd"]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(first)
        runpy.run_path(first, run_name="__main__")


def main() -> None:
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # what is left then is reported as leaked
    for line in sys.stdin:
        child = os.fork()
        if not child:
            become(json.loads(line))
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
