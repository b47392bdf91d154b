"""A Llama forward pass on packed tokens, laid over an unmodified transformers model.

The patched pass computes any mixture of prefilling and decoding queries at once, without padding.
Each layer runs a norm that also adds the residual, one projection for q, k and v, rotation and
cache write in one op, attention over the rows of the cache, and one projection for gate and up. On
the CPU the weights of projections are packed, and the model's parameters hold no memory meanwhile.
Elsewhere the weights are the model's own: its parameters become views of the merged weights.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, Literal, overload

import torch
from transformers import PreTrainedModel

import baton_kernels as kernels

from .check import check_model, foreign_hooks, is_foreign
from .family import Family
from .handle import ModelHandle
from .layer import Layer, norm_of, tensors_of
from .packed_batch import PackedBatch
from .packed_parameter import check_values
from .patched_forward import PatchedForward
from .rope import RotaryTable
from .structure import CausalLM, structure_of
from .weights import ModelWeights, Weight, checked_weight_dtype

_LOGITS = ("last", "all", "none")


def project(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Every projection of the patched pass, `x @ weight.T + bias`, in one function that can be
    replaced.

    Args:
        x: `[tokens, in_features]`.
        weight: `[out_features, in_features]`; packed on the CPU.
        bias: `[out_features]` or None.
    """
    return kernels.linear(x, weight, bias)


def patch_llama(
    model: PreTrainedModel,
    *,
    weight_dtype: str | torch.dtype | None = None,
    keep_parameters: bool = False,
) -> PatchedLlama:
    """Lay the packed forward pass over a model, until `undo`.

    `with patch_llama(model) as llama:` undoes at the end of the block. While patched, `model(...,
    batch=PackedBatch, cache=KVCache)` computes packed tokens. A call without `batch`, e.g. by
    `generate`, works as before where the model keeps its parameters: on devices other than the CPU,
    and with `keep_parameters`.

    On the CPU the projections read packed weights (`baton_kernels.pack_linear`), which the patch
    owns: the model's own parameters of these weights hold no memory until `undo` restores them, bit
    by bit. Until then an unpatched call is refused, and reading a parameter (`state_dict`,
    `save_pretrained`, a copy, a pickle) gives its exact values, unpacked for that one read. A tied
    embedding looks its rows up in the packed weight.

    Args:
        model: LlamaForCausalLM, or a decoder that differs from it in details (Granite, Mistral,
            Qwen2, Qwen3, SmolLM3), in float32, float16 or bfloat16, on one device. Written:
            `model.forward` becomes an instance attribute. On the CPU, stand-ins replace the weights
            of the projections; elsewhere those of q, k, v and of gate, up become views of merged
            tensors, with the same values. At most one layer's weights exist twice at a time.
        weight_dtype: "int8" rounds the weights of all projections and of the head to int8, with a
            scale per output (`pack_linear`), on the CPU only; this takes half of bfloat16's memory.
            Logits differ; `python -m bench.weights` prints by how much. The original values are
            then lost, even after `undo`, and reading them raises an error, unless `keep_parameters`
            is set. None: the model's dtype, exact.
        keep_parameters: on the CPU the model keeps its parameters in addition to the packed
            weights, which takes their memory twice; unpatched calls then keep working. Values that
            are written into a parameter meanwhile do not reach the packed pass. On other devices it
            has no effect.

    Raises:
        TypeError: model is not a torch module.
        ValueError: model is patched already, or weight_dtype is something else.
        RuntimeError: the model's weights are lost, because an earlier patch rounded them.
        NotImplementedError: the model, something in its config, or int8 weights on its device are
            not supported; the message says what is.

    Undefined: results after a module of the model was replaced while patched. Moving or converting
        the model while patched is noticed and refused, and so is a forward hook, which the packed
        pass would not call.

    Source: BATON, decoding a batch whose queries come and go; merged projections are common in
        engines.
    """
    # A parameter whose data was made in inference mode could not be trained any more.
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(getattr(model, "__dict__", {}).get("forward"), PatchedForward):
            raise ValueError(
                "patch_llama: model must not be patched already, got a patched one; "
                "use its handle, or call baton_engines.unpatch(model) first"
            )
        check_values(model)
        family = check_model(model)
        dtype = checked_weight_dtype(
            "patch_llama", weight_dtype, structure_of(model).lm_head.weight.device
        )
        return PatchedLlama(model, family, weight_dtype=dtype, keep_parameters=keep_parameters)


class PatchedLlama(ModelHandle):
    """The packed forward pass of a model; made by `patch_llama`.

    Args:
        model: a model that `patch_llama` has checked.
        family: the family of the model's classes.
        weight_dtype: of the packed weights; None for the model's dtype.
        keep_parameters: see `patch_llama`.

    Attributes:
        model: the model.
        num_layers, num_heads, num_kv_heads, head_dim, vocab_size: int, its sizes.
        dtype, device: of its weights.
        weight_dtype: torch.int8 where the packed weights are rounded to it, else None.
        whole_prompts: bool; whether prompts must be computed whole: dynamic RoPE uses the
            frequencies of a forward's last token.
    """

    model: PreTrainedModel
    can_be_captured = takes_eight_bits = True

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        *,
        weight_dtype: torch.dtype | None = None,
        keep_parameters: bool = False,
    ) -> None:
        decoder = structure_of(model)
        config = decoder.config
        attention = decoder.model.layers[0].self_attn
        self.model = model
        self._decoder: CausalLM = decoder
        self.num_layers = config.num_hidden_layers
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = attention.head_dim
        self.vocab_size = decoder.lm_head.out_features
        self.dtype, self.device = decoder.lm_head.weight.dtype, decoder.lm_head.weight.device
        self._scale = attention.scaling
        # Granite multiplies by constants; in other models they are 1.
        self._embedding_multiplier = getattr(config, "embedding_multiplier", 1.0)
        self._residual_multiplier = getattr(config, "residual_multiplier", 1.0)
        self._logits_scaling = getattr(config, "logits_scaling", 1.0)
        self._head_sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        self._rotary = RotaryTable(decoder.model.rotary_emb, self.head_dim)
        self.whole_prompts = self._rotary.dynamic
        self.weight_dtype = weight_dtype
        self._keep_parameters = keep_parameters
        self._weights = ModelWeights(
            decoder, self.num_layers, dtype=weight_dtype, keep_parameters=keep_parameters
        )
        self._layers = [
            Layer.of(layer, weights, family.window(config, index))
            for index, (layer, weights) in enumerate(
                zip(decoder.model.layers, self._weights.layers, strict=False)
            )
        ]
        self._fixed = [*tensors_of((*self._layers, self._weights.head))]
        # An instance attribute hides the method of the class; `undo` restores what was hidden
        # before.
        self._hidden_forward = model.__dict__.get("forward")
        # Keeps the dictionaries themselves, so that hooks that are added later are seen at no cost.
        self._hooks = [
            hooks
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._forward: PatchedForward | None = PatchedForward(self, model.forward, self._refusal)
        model.forward = self._forward

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

        A row's logits are those of `model(input_ids)` on its query by itself, and do not depend on
        the other rows.

        Args:
            token_ids: int32 or int64 `[total_tokens]`, on the model's device, each below the
                vocabulary size.
            batch: PackedBatch of the cache's shape, whose rows already count these tokens.
            cache: KVCache of `new_cache`. Written: the columns of the packed tokens.
            logits: "last" for the logits of each row's last token, "all" for those of every packed
                token, "none" for none.
            float32: bool; whether logits are converted to float32, or may stay in the dtype in
                which they were computed, with the same values.

        Returns:
            `[rows, vocab_size]` or `[total_tokens, vocab_size]`, made in inference mode; or
            None.

        Raises:
            ValueError: token_ids does not fit the batch, the cache does not fit the model, or
                logits is not one of the three.
            RuntimeError: the patch was undone, or the model was moved or converted while patched.

        Undefined: the result when columns of a row have never been written.
        """
        self._check_call(token_ids, batch, cache, logits)
        cos, sin = self._rotary(batch)
        total_tokens = len(token_ids)
        body = self._decoder.model
        hidden = self._weights.embed(token_ids)
        residual = _scaled(hidden, self._embedding_multiplier)
        hidden = kernels.rms_norm(residual, *self._layers[0].attention_norm)
        pairs = zip(cache.keys.unbind(0), cache.values.unbind(0), strict=True)
        for index, (layer, caches) in enumerate(zip(self._layers, pairs, strict=True)):
            scales = cache.scales(index)
            if layer is not self._layers[0]:
                hidden, residual = kernels.rms_norm(
                    hidden, *layer.attention_norm, residual=residual
                )
            qkv = project(hidden, *layer.qkv).view(total_tokens, -1, self.head_dim)
            query, key, value = qkv.split_with_sizes(self._head_sizes, 1)
            if layer.query_norm is not None and layer.key_norm is not None:
                query = kernels.rms_norm(query, *layer.query_norm)
                key = kernels.rms_norm(key, *layer.key_norm)
            places = (key, value, *caches, batch.token_slots, batch.token_columns)
            if layer.rotates:
                query = kernels.append_kv(*places, query=query, cos=cos, sin=sin, **scales)
            else:
                kernels.append_kv(*places, **scales)
            hidden = kernels.ragged_attention(
                query,
                *caches,
                batch.cu_seqlens_q,
                batch.slots,
                batch.starts,
                batch.lengths,
                scale=self._scale,
                window=layer.window,
                max_query_length=batch.max_query_length,
                max_length=batch.max_length,
                **scales,
            )
            hidden = project(hidden.view(total_tokens, -1), *layer.output)
            hidden = _scaled(hidden, self._residual_multiplier)
            hidden, residual = kernels.rms_norm(hidden, *layer.mlp_norm, residual=residual)
            hidden = project(kernels.silu_and_mul(project(hidden, *layer.gate_up)), *layer.down)
            hidden = _scaled(hidden, self._residual_multiplier)

        if logits == "none":
            return None
        if logits == "last" and batch.max_query_length > 1:
            hidden = hidden.index_select(0, batch.last_tokens)
            residual = residual.index_select(0, batch.last_tokens)
        hidden, _ = kernels.rms_norm(hidden, *norm_of(body.norm), residual=residual)
        computed = project(hidden, *self._weights.head)
        if float32 or self._logits_scaling != 1.0:
            computed = computed.float()
        return _scaled(computed, 1 / self._logits_scaling)

    def _refusal(self) -> str | None:
        """Why an unpatched call cannot be computed; None if it can."""
        if self.has_parameters:
            return None
        if self.weight_dtype is not None:
            return (
                "model.forward: the model's weights were rounded to int8 for the patched pass, and "
                "its own values are gone; load the model again, or patch it with "
                "patch_llama(model, weight_dtype='int8', keep_parameters=True)"
            )
        return (
            "model.forward: the model's weights are packed for the patched pass; undo the patch "
            "(the relay's close, or the handle's undo), or patch with "
            "patch_llama(model, keep_parameters=True), before an unpatched call"
        )

    @property
    def has_parameters(self) -> bool:
        """Whether the model's parameters hold their values, so that unpatched calls work."""
        return self._weights.has_parameters

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that a forward's projections read, including the head's."""
        return self._weights.num_bytes

    def addresses(self, longest: int) -> tuple[int, ...]:
        """See `ModelHandle.addresses`."""
        self._check_model()
        # These two are looked up in each forward, because they may be replaced.
        found = (self._weights.embedding, norm_of(self._decoder.model.norm)[0])
        tensors = itertools.chain(self._fixed, found)
        return (*self._rotary.addresses(longest), *map(torch.Tensor.data_ptr, tensors))

    def twin(self) -> PatchedLlama:
        """A handle on the same patch whose `forward` another thread may call at the same time; use
        it only until `undo`."""
        twin = object.__new__(PatchedLlama)
        twin.__dict__.update(self.__dict__)
        # The rotary table is the only part of a forward that has state.
        twin._rotary = copy.deepcopy(self._rotary)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as the unpatched model, which is patched again where it is loaded."""
        if not (self._weights.is_exact or self._keep_parameters):
            raise NotImplementedError(
                "PatchedLlama: a model in int8 can be given to another process only with its own "
                "weights; patch it with patch_llama(model, weight_dtype='int8', "
                "keep_parameters=True)"
            )
        state = dict(self.model.__dict__)
        del state["forward"]
        options = {"weight_dtype": self.weight_dtype, "keep_parameters": self._keep_parameters}
        return _patched, (type(self.model), state, options)

    def undo(self) -> None:
        """Restore the model: its forward method, and its parameters, the same objects with the same
        bits, each with separate memory again. Undoing twice does nothing.

        Weights that were rounded to int8 and not kept are lost: the model's parameters then stay
        without values, and reading them raises an error.
        """
        forward, self._forward = self._forward, None
        if forward is None:
            return
        forward.handle = None
        # Something else may have replaced our forward in turn. Its replacement then stays, and ours
        # just passes calls on.
        if self.model.__dict__.get("forward") is forward:
            if self._hidden_forward is None:
                del self.model.forward
            else:
                self.model.forward = self._hidden_forward
        with torch.inference_mode(False), torch.no_grad():
            # Drops the last references to a weight before it is restored.
            self._layers.clear()
            self._fixed.clear()
            self._weights.restore()

    def _check_model(self) -> None:
        where = "PatchedLlama.forward"
        if self._forward is None:
            raise RuntimeError(f"{where}: the patch was undone; call patch_llama again")
        if not self._weights.is_shared():
            raise RuntimeError(
                f"{where}: the model's weights were moved, converted or replaced while patched; "
                "undo, change the model, and patch again"
            )
        if any(
            map(is_foreign, itertools.chain.from_iterable(h.values() for h in self._hooks if h))
        ):
            raise NotImplementedError(
                f"{where}: modules must be free of forward hooks, which the packed pass does not "
                f"call, got a hook on {next(foreign_hooks(self.model))}"
            )

    def _check_call(
        self, token_ids: torch.Tensor, batch: PackedBatch, cache: kernels.KVCache, logits: str
    ) -> None:
        where = "PatchedLlama.forward"
        self._check_model()
        if logits not in _LOGITS:
            raise ValueError(f"{where}: logits must be one of {', '.join(_LOGITS)}, got {logits!r}")
        if token_ids.shape != batch.positions.shape:
            raise ValueError(
                f"{where}: token_ids must be [{batch.total_tokens}], got {list(token_ids.shape)}"
            )
        expected = (self.num_layers, self.num_kv_heads, self.head_dim)
        sizes = cache.keys.shape
        if (sizes[0], sizes[2], sizes[4]) != expected:
            raise ValueError(
                f"{where}: cache must have (num_layers, num_kv_heads, head_dim) = {expected}, "
                f"got {(sizes[0], sizes[2], sizes[4])}"
            )


def _patched(
    kind: type[PreTrainedModel], state: dict[str, Any], options: dict[str, Any]
) -> PatchedLlama:
    model = kind.__new__(kind)
    model.__dict__.update(state)
    return patch_llama(model, **options)


def _scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """`x * factor`, rounded once; x itself if the factor is 1."""
    return x if factor == 1.0 else x * factor
