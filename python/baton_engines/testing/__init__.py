"""Models and prefillers for tests and benchmarks."""

from .fake_llama import FakeLlama

__all__ = ["FakeLlama"]
