"""Small models to patch, and helpers that compare them."""

import torch
from mixed_batch import mixed_batch
from torch import nn

from baton_kernels.testing import assert_same_bits

# Name -> changes of `small_llama`.
MODELS = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
}


def bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of its parameters."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(state: dict[str, torch.Tensor], bits: dict[str, torch.Tensor]) -> None:
    """The same names, with the same bits."""
    assert state.keys() == bits.keys()
    for name, value in bits.items():
        assert_same_bits(state[name], value, name)


def logits_of(llama) -> torch.Tensor:
    """All logits of `mixed_batch`."""
    token_ids, batch, cache = mixed_batch(llama)
    return llama.forward(token_ids, batch, cache, logits="all")
