"""The decoders that the packed pass supports: Llama, and decoders that differ from it in details.

Details are a sliding window, norms of each head's query and key, layers without rotary embedding,
and constant factors. Everything else must be as in Llama; `check_model` checks that module by
module.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

# Package of transformers.models -> prefix of its classes.
_PREFIXES = {
    "llama": "Llama",
    "granite": "Granite",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
}
# In these every layer slides if the config has a window; elsewhere only the layers that are named.
_ALL_LAYERS_SLIDE = {"Mistral"}
_LAYERS_SLIDE_BY_TYPE = {"Qwen2", "Qwen3", "SmolLM3"}

SUPPORTED_MODELS = tuple(f"{prefix}ForCausalLM" for prefix in _PREFIXES.values())


class Family(NamedTuple):
    """The classes of a supported model.

    Attributes:
        prefix: of the class names, e.g. "Qwen3".
        model: the model's class or one of its bases.
    """

    prefix: str
    model: type[PreTrainedModel]

    def kind(self, name: str) -> type[Any]:
        """A class of the family: Model, DecoderLayer, Attention, MLP or RMSNorm."""
        return getattr(sys.modules[self.model.__module__], f"{self.prefix}{name}")

    def window(self, config: PreTrainedConfig, layer: int) -> int | None:
        """How many tokens a token of that layer sees, including itself; None for all.

        Args:
            config: of the model.
            layer: its index.
        """
        if self.prefix in _ALL_LAYERS_SLIDE:
            return config.sliding_window
        if self.prefix in _LAYERS_SLIDE_BY_TYPE:
            slides = config.layer_types[layer] == "sliding_attention"
            return config.sliding_window if slides else None
        return None


def find_family(model: object) -> Family | None:
    """The family of a model, found by its class or a base class; None if there is none."""
    for kind in type(model).__mro__:
        root, _, package = kind.__module__.rpartition(".")[0].rpartition(".")
        prefix = _PREFIXES.get(package)
        if (
            prefix is not None
            and root == "transformers.models"
            and kind.__name__ == f"{prefix}ForCausalLM"
        ):
            return Family(prefix, kind)
    return None
