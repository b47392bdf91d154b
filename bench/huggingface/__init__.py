"""Unmodified transformers models on this package and on transformers' own attention.

Decode steps, continuous batching and peak memory; see `python -m bench.huggingface --help`.
"""
