"""baton_kernels inside Hugging Face transformers.

Importing this package registers `attn_implementation="baton"`.
"""

# First, because it rejects versions of transformers that may lack parts that the others import.
from . import versions as versions
from .accelerate import Accelerated, accelerate
from .adapt import adapt
from .any_model import AnyModel
from .attention import register
from .sharing import unpatch
from .slot_cache import SlotCache, cache_argument, slot_cache

__all__ = [
    "Accelerated",
    "AnyModel",
    "SlotCache",
    "accelerate",
    "adapt",
    "cache_argument",
    "register",
    "slot_cache",
    "unpatch",
]

register()
