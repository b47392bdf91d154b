"""The entry points, which vLLM calls in each of its processes.

`platform` is called while vLLM's modules are half imported, and what it raises is only logged:
nothing of vLLM is imported until a function runs.
"""

from __future__ import annotations

import importlib.metadata

from .switch import invariant, overrides

_BACKEND = "baton_engines.vllm.Backend"
_OVERRIDE = "baton_engines.vllm.Override"
_PLATFORM = "baton_engines.vllm.platform.BatonCpuPlatform"


def register() -> None:
    """vllm.general_plugins: gives the name CUSTOM a meaning, unless it has one already."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, _BACKEND)
    if overrides():
        register_backend(AttentionBackendEnum.CPU_ATTN, _OVERRIDE)
    if invariant():
        from .layers import register_layers

        register_layers()


def platform() -> str | None:
    """vllm.platform_plugins: a CPU platform that differs from vLLM's in one answer.

    vLLM's own ignores `--attention-backend CUSTOM` on a CPU. Other platforms do not, and vLLM
    refuses to choose between two plugins: None on them, and where there is another plugin.
    """
    from vllm.platforms import cpu_platform_plugin

    plugins = importlib.metadata.entry_points(group="vllm.platform_plugins")
    if any(plugin.value.split(":")[0] != __name__ for plugin in plugins):
        return None
    return None if cpu_platform_plugin() is None else _PLATFORM
