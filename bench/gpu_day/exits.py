"""How a stage's process ends when it cannot go on, and whether its device still answers."""

from __future__ import annotations

# The device no longer answers, and a new process would help.
BROKEN_DEVICE = 71
# The stage cannot run here, which its headline explains.
SKIPPED = 77


def is_broken() -> bool:
    """Whether this process can no longer use its GPU, as after an illegal access."""
    # Here and not above: the runner, which needs the codes only, does without torch.
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.synchronize()
        return False
    except Exception:
        return True
