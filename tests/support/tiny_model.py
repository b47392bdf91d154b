"""A model folder for tests of everything around a model: random weights, one token per byte."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from baton_engines.testing.small_llama import small_llama

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
EOS = 256


def byte_tokenizer(special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token per byte, an end-of-sequence token, and more special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)} | {"<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_model(path: Path, **changes: object) -> Path:
    """Writes a model of two layers with random weights, and the tokenizer.

    Args:
        path: the folder.
        changes: entries of the LlamaConfig.
    """
    byte_tokenizer().save_pretrained(path)
    sizes = {"vocab_size": EOS + 1, "max_position_embeddings": 512}
    settings = {**sizes, "bos_token_id": None, "eos_token_id": EOS, **changes}
    small_llama(**settings).save_pretrained(path)
    return path
