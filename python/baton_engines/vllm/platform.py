"""vLLM's CPU platform, except that it honors `--attention-backend CUSTOM`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

if TYPE_CHECKING:
    from vllm.platforms.cpu import CpuPlatform as _Platform
else:
    # The one that vLLM would have chosen: there is another where zentorch is installed.
    _Platform = resolve_obj_by_qualname(cpu_platform_plugin())


class BatonCpuPlatform(_Platform):
    """Chooses the backend registered as CUSTOM if the user selects it, and refuses configurations
    that this backend cannot run, as vLLM's other platforms do."""

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        """Path of the backend's class.

        Raises:
            ImportError: CUSTOM is ours, and vLLM's version does not fit.
            ValueError: CUSTOM cannot serve this model or configuration.
        """
        if selected_backend is None or selected_backend.name != "CUSTOM":
            return super().get_attn_backend_cls(
                selected_backend, attn_selector_config, *args, **kwargs
            )
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(
                f"baton_engines.vllm: attention backend CUSTOM does not fit: {', '.join(reasons)}"
            )
        return selected_backend.get_path()
