"""The process of `prefill.apart`: computes the prompts that it is given until its socket closes.

Run as python -m baton_engines.prefill.apart_worker SOCKET MODEL THREADS, with two descriptors and a
number.
"""

from __future__ import annotations

import json
import os
import socket
import sys

import torch

from .apart import MAX_MESSAGE_BYTES
from .base import compute
from .handover import Handover, Sizes


def main(socket_number: int, model_file: int, threads: int) -> None:
    """Sends {} when ready, then one message per job: {} for success, or {"error": description}."""
    with socket.socket(fileno=socket_number) as parent:
        try:
            torch.set_num_threads(threads)
            # Mapped instead of read, so that all workers share its pages.
            model = torch.load(f"/proc/self/fd/{model_file}", mmap=True, weights_only=False)
            os.close(model_file)
            sizes = Sizes.of(model)
        except Exception as error:
            parent.send(_said(error))
            return
        parent.send(b"{}")
        while True:
            message, files, _, _ = socket.recv_fds(parent, MAX_MESSAGE_BYTES, 1)
            if not message:
                return
            try:
                _prefill(model, sizes, files[0], json.loads(message)["lengths"])
                answer = b"{}"
            except Exception as error:
                answer = _said(error)
            finally:
                os.close(files[0])
            parent.send(answer)


def _prefill(model, sizes: Sizes, file: int, lengths: list[int]) -> None:
    handover = Handover(file, sizes, lengths)
    rows, logits = compute(model, handover.prompts())
    for targets, sources in zip(handover.rows(), rows, strict=True):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
    handover.logits.copy_(logits)


def _said(error: Exception) -> bytes:
    return json.dumps({"error": repr(error)[:1000]}).encode()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
