"""Any transformers decoder as the model of a relay, running the model's own code without a patch.

The model computes packed tokens of many queries as if they were one row `[1, total_tokens]`: its
norms, projections and rotary embedding treat each token separately, and its attention is ours
(`attn_implementation="baton"`), which knows the rows. Keys and values go into a `KVCache` through
transformers' own cache interface.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, NoReturn, overload

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

import baton_kernels as kernels
from baton_engines.llama import ModelHandle, PackedBatch

from .attention import NAME, PackedRows, register
from .slot_cache import cache_argument

# Layer types whose state is keys and values per token, as a KVCache holds them.
_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}
# Their frequencies depend on the longest row of a forward, and so on other queries.
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# Enough to see two queries of different lengths, few enough to cost nothing.
_PROBE_LENGTHS = (3, 2)


class AnyModel(ModelHandle):
    """An unmodified transformers decoder as the model of a relay.

    A row's logits are those of `model(input_ids)` on its query by itself, up to the rounding of the
    model's own modules, whose sums may depend on the number of packed tokens (torch's matrix
    products do). `PatchedLlama` has no such dependence and is faster, but supports Llama and its
    close relatives only.

    Args:
        model: a causal language model of transformers, loaded, in float32, float16 or bfloat16.
            Written: its attention implementation, until `undo`. Two short queries are computed
            once, to see how its layers use the cache and attention.

    Attributes:
        model: the model.
        num_layers, num_kv_heads, head_dim, vocab_size: int, its sizes as its cache needs them
            (under tensor parallelism: those of this rank).
        dtype, device: those of its keys and values.
        whole_prompts: bool, False: prompts may be computed in parts.
        num_ranks: int, processes that share every layer (tensor parallelism).

    Raises:
        TypeError: model is not a transformers model.
        NotImplementedError: the model has an encoder, layers with a state other than keys and
            values, shared or differing layers, attention that is not causal, or a rotary embedding
            that depends on the longest query; the message says which.

    Undefined: results after the model's attention implementation was changed while in use.

    Source: AttentionInterface and Cache of transformers; Orca's selective batching (OSDI'22).
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel) -> None:
        _check(model)
        register()
        self.model = model
        self._cache_name = cache_argument(model)
        self._embedding = _embedding_of(model)
        self.vocab_size = self._embedding.shape[0]
        self.num_ranks = getattr(model, "tp_size", None) or 1
        self._former = model.config._attn_implementation
        model.set_attn_implementation(NAME)
        try:
            if model.config.get_text_config()._attn_implementation != NAME:
                _refuse("model", "one that uses AttentionInterface", type(model).__name__)
            self._probe()
        except BaseException:
            self.undo()
            raise

    @overload
    def forward(
        self,
        token_ids: torch.Tensor,
        batch: PackedBatch,
        cache: kernels.KVCache,
        *,
        logits: Literal["last", "all"] = ...,
        float32: bool = ...,
    ) -> torch.Tensor: ...
    @overload
    def forward(
        self,
        token_ids: torch.Tensor,
        batch: PackedBatch,
        cache: kernels.KVCache,
        *,
        logits: str,
        float32: bool = ...,
    ) -> torch.Tensor | None: ...
    @torch.inference_mode()
    def forward(
        self,
        token_ids: torch.Tensor,
        batch: PackedBatch,
        cache: kernels.KVCache,
        *,
        logits: str = "last",
        float32: bool = True,
    ) -> torch.Tensor | None:
        """Compute the packed tokens: write their keys and values, return logits.

        Args:
            token_ids: int32 or int64 `[total_tokens]`.
            batch: PackedBatch of the cache's shape, whose rows already count these tokens.
            cache: KVCache of `new_cache`. Written: the columns of the packed tokens.
            logits: "last" for the logits of each row's last token, "all" for those of every packed
                token, "none" for none.
            float32: bool; whether logits are converted to float32, or may stay in the dtype in
                which they were computed, with the same values.

        Returns:
            `[rows, vocab_size]` or `[total_tokens, vocab_size]`; or None.

        Raises:
            ValueError: token_ids does not fit the batch, or logits is not one of the three.
            RuntimeError: `undo` was called.
        """
        if self._former is None:
            raise RuntimeError("AnyModel.forward: the handle must be in use, got one undone")
        if token_ids.shape != batch.positions.shape:
            raise ValueError(
                f"AnyModel.forward: token_ids must be [{batch.total_tokens}], "
                f"got {list(token_ids.shape)}"
            )
        keep: int | torch.Tensor
        if logits == "last":
            keep = batch.last_tokens.long()
        elif logits == "all":
            keep = 0
        elif logits == "none":
            keep = torch.zeros(0, dtype=torch.long, device=token_ids.device)
        else:
            raise ValueError(
                f"AnyModel.forward: logits must be one of last, all, none, got {logits!r}"
            )
        rows = PackedRows(
            batch.cu_seqlens_q,
            batch.slots,
            batch.starts,
            batch.lengths,
            batch.max_query_length,
            batch.max_length,
        )
        layers = [
            _PackedLayer(*pair, batch)
            for pair in zip(cache.keys.unbind(0), cache.values.unbind(0), strict=True)
        ]
        found = self._call(token_ids, batch.positions, Cache(layers=[*layers]), rows, keep)
        if logits == "none":
            return None
        return found.float() if float32 else found

    def twin(self) -> AnyModel:
        """A handle on the same model whose `forward` another thread may call at the same time."""
        return copy.copy(self)

    def undo(self) -> None:
        """Restore the model's former attention implementation. Undoing twice does nothing."""
        if self._former is not None:
            self.model.set_attn_implementation(self._former)
            self._former = None

    def __reduce__(self) -> tuple[Any, ...]:
        return AnyModel, (self.model,)

    def _call(self, token_ids, positions, cache, rows, keep) -> torch.Tensor:
        result = self.model(
            input_ids=token_ids.view(1, -1).long(),
            position_ids=positions.view(1, -1).long(),
            use_cache=True,
            logits_to_keep=keep,
            baton_rows=rows,
            **{self._cache_name: cache},
        )
        return result.logits[0]

    @torch.inference_mode()
    def _probe(self) -> None:
        """Computes two short queries, to learn the sizes of keys and values and to check that every
        layer writes the cache once and attends through `attention`."""
        config = self.model.config.get_text_config()
        layers = [_ProbeLayer() for _ in range(config.num_hidden_layers)]
        total = sum(_PROBE_LENGTHS)
        device = self._embedding.device
        bounds = [0, _PROBE_LENGTHS[0], total]
        cu_seqlens, slots, starts, lengths = torch.tensor(
            [*bounds, 0, 0, *bounds[:2], *_PROBE_LENGTHS], dtype=torch.int32, device=device
        ).split([3, 2, 2, 2])
        # Rows that lie one after the other in slot 0, which is where one packed forward writes
        # them.
        rows = PackedRows(cu_seqlens, slots, starts, lengths, max(_PROBE_LENGTHS), total)
        positions = torch.cat([torch.arange(n, device=device) for n in _PROBE_LENGTHS])
        token_ids = torch.zeros(total, dtype=torch.long, device=device)
        self._call(token_ids, positions, Cache(layers=[*layers]), rows, 0)
        counts = [layer.num_updates for layer in layers]
        if counts != [1] * len(layers):
            _refuse("every layer", "with keys and values, written once per forward", counts)
        shapes = {(layer.keys.shape[1], layer.keys.shape[3]) for layer in layers}
        shapes |= {(layer.values.shape[1], layer.values.shape[3]) for layer in layers}
        if len(shapes) != 1:
            _refuse("(KV heads, head dimension)", "the same in all layers", sorted(shapes))
        ((self.num_kv_heads, self.head_dim),) = shapes
        self.num_layers = len(layers)
        self.dtype, self.device = layers[0].keys.dtype, layers[0].keys.device


class _Layer(CacheLayerMixin):
    """A cache layer for transformers. Each row has its own length, so it reports none."""

    is_sliding = False
    # None in the base class until memory is allocated; here it always is.
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Does nothing: the memory is already allocated."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of key columns and of dropped columns, for the packed tokens."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """The number of tokens before this forward."""
        return 0

    def get_max_length(self) -> int:
        """The largest number of tokens; -1 without a bound."""
        return -1


class _PackedLayer(_Layer):
    """One layer of a KVCache, written at the slots and columns of packed tokens."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, batch: PackedBatch) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self._slots, self._columns = batch.token_slots, batch.token_columns

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values `[1, num_kv_heads, total_tokens, head_dim]`; return the slot
        cache."""
        kernels.append_kv(
            key_states[0].transpose(0, 1),
            value_states[0].transpose(0, 1),
            self.keys,
            self.values,
            self._slots,
            self._columns,
        )
        return self.keys, self.values


class _ProbeLayer(_Layer):
    """Keeps the keys and values it is given, as a cache of one slot that holds the packed
    tokens."""

    num_updates = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep keys and values as they are."""
        self.num_updates += 1
        self.keys, self.values = key_states, value_states
        return key_states, value_states


def _check(model: object) -> None:
    """Rejects models whose problem the probe would not notice."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"AnyModel: model must be a transformers model, got {type(model).__name__}")
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        _refuse("model", "a decoder with a language model head", type(model).__name__)
    others = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        _refuse("layer_types", " or ".join(sorted(_LAYER_TYPES)), sorted(others))
    rope = getattr(config, "rope_parameters", None) or {}
    # One set of parameters for all layers, or one per layer type.
    for parameters in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if parameters.get("rope_type") in _BATCH_DEPENDENT_ROPE:
            _refuse("rope_type", "one that does not depend on length", parameters["rope_type"])


def _embedding_of(model: PreTrainedModel) -> torch.Tensor:
    """`[vocab_size, hidden]`."""
    weight = model.get_input_embeddings().weight
    if not isinstance(weight, torch.Tensor):
        _refuse("input embedding", "a module with one weight", type(weight).__name__)
    return weight


def _refuse(name: str, expected: str, actual: object) -> NoReturn:
    raise NotImplementedError(f"AnyModel: {name} must be {expected}, got {actual}")
