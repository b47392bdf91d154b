"""How a stage's process ends when it cannot continue, and whether its device still responds."""

from __future__ import annotations

# The device no longer responds, and a new process would help.
BROKEN_DEVICE = 71
# The stage cannot run here; its headline says why.
SKIPPED = 77


def is_broken() -> bool:
    """Whether this process can no longer use its GPU, e.g. after an illegal access."""
    # Imported here, because the runner uses only the codes and needs no torch.
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.synchronize()
        return False
    except Exception:
        return True
