"""A Llama forward pass on packed tokens, laid over an unmodified transformers model.

The patched pass computes any mixture of prefilling and decoding queries in one go, without padding.
Per layer: norm with the residual added in, one projection for q, k and v, rotation and cache write
in one op, attention over the rows of the cache, and one projection for gate and up. On the CPU the
weights of projections lie packed, and the model's parameters step aside meanwhile; elsewhere they
are the model's own: what is merged here is what its parameters are views of.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import baton_kernels as kernels

from .check import check_model, foreign_hooks, is_foreign
from .family import Family
from .handle import ModelHandle
from .layer import Layer, norm_of, tensors_of
from .packed_batch import PackedBatch
from .packed_parameter import check_values
from .rope import RotaryTable
from .structure import CausalLM, structure_of
from .weights import ModelWeights, Weight, checked_weight_dtype

_LOGITS = ("last", "all", "none")


def project(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Every projection of the patched pass, `x @ weight.T + bias`: here to be replaced in one
    place.

    Args:
        x: `[tokens, in_features]`.
        weight: `[out_features, in_features]`, on the CPU packed.
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
    batch=PackedBatch, cache=KVCache)` computes packed. A call without `batch` is what it was
    before, `generate` included, where the model has its parameters: on devices other than the CPU,
    and with `keep_parameters`.

    On the CPU projections read their weights packed (`baton_kernels.pack_linear`), and the patch
    owns them: the model's own parameters of these weights hold no memory until `undo` gives them
    back, bit by bit. Until then an unpatched call is refused, and what reads a parameter
    (`state_dict`, `save_pretrained`, a copy, a pickle) gets its exact values, unpacked for that one
    time. A tied embedding looks its rows up in the packed weight.

    Args:
        model: LlamaForCausalLM, or a decoder that differs from it in details (Granite, Mistral,
            Qwen2, Qwen3, SmolLM3), in float32, float16 or bfloat16, on one device. Written:
            `model.forward` becomes an instance attribute. On the CPU, stand-ins take the place of
            the projections' weights; elsewhere those of q, k, v and of gate, up become views of
            merged tensors, with the same values. At most one layer's weights exist twice while that
            is done.
        weight_dtype: "int8" rounds the weights of all projections and of the head to int8, with a
            scale per output (`pack_linear`), on the CPU: half of bfloat16's memory. Logits differ;
            `python -m bench.weights` prints by how much. Their own values are gone then, also after
            `undo`: whoever reads them is told so. `keep_parameters` keeps them. None: the model's
            dtype, exact.
        keep_parameters: on the CPU the model keeps its parameters beside the packed weights, which
            takes their memory twice, and unpatched calls go on working. What is written into a
            parameter meanwhile is not seen by the packed pass. Elsewhere it changes nothing.

    Raises:
        TypeError: model is no torch module.
        ValueError: model is patched already, or weight_dtype is something else.
        RuntimeError: the model's weights are gone: an earlier patch has rounded them.
        NotImplementedError: the model, or something in its config, is not supported, or its device
            has no weights in int8; the message names what is.

    Undefined: results after a module of the model has been replaced while patched. Moving or
        converting the model while patched is noticed and refused, and so is a forward hook, which
        the packed pass would not call.

    Source: BATON, decoding a batch whose queries come and go; merged projections as engines have
        them.
    """
    # A parameter whose data was made in inference mode could never be trained again.
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
        family: its classes.
        weight_dtype: of the packed weights; None for the model's.
        keep_parameters: as `patch_llama` takes it.

    Attributes:
        model: the model.
        num_layers, num_heads, num_kv_heads, head_dim, vocab_size: int, its sizes.
        dtype, device: of its weights.
        weight_dtype: torch.int8 where the packed weights are rounded to it, else None.
        whole_prompts: bool; whether a prompt in parts would be another prompt: the frequencies of
            dynamic RoPE are those of a forward's last token.
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
        # Granite multiplies by constants; everywhere else they are 1.
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
        # An attribute of the instance hides the method of the class; whatever hid it before comes
        # back on undo.
        self._hidden_forward = model.__dict__.get("forward")
        # The dictionaries themselves, so that a hook that comes later is seen without a search.
        self._hooks = [
            hooks
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._forward: PatchedForward | None = PatchedForward(self, model.forward)
        model.forward = self._forward

    @overload
    def forward(
        self,
        token_ids: torch.Tensor,
        batch: PackedBatch,
        cache: kernels.KVCache,
        *,
        logits: Literal["last", "all"] = ...,
    ) -> torch.Tensor: ...
    @overload
    def forward(
        self, token_ids: torch.Tensor, batch: PackedBatch, cache: kernels.KVCache, *, logits: str
    ) -> torch.Tensor | None: ...
    @torch.inference_mode()
    def forward(
        self,
        token_ids: torch.Tensor,
        batch: PackedBatch,
        cache: kernels.KVCache,
        *,
        logits: str = "last",
    ) -> torch.Tensor | None:
        """Compute the packed tokens: write their keys and values, return logits.

        A row's logits are those of `model(input_ids)` on its query alone, and do not depend on the
        other rows.

        Args:
            token_ids: int32 or int64 `[total_tokens]`, on the model's device, each below the
                vocabulary size.
            batch: PackedBatch of the cache's shape, whose rows already count these tokens.
            cache: KVCache of `new_cache`. Written: the columns of the packed tokens.
            logits: "last" for those of each row's last token, "all" for those of every packed
                token, "none" for none.

        Returns:
            float32 `[rows, vocab_size]` or `[total_tokens, vocab_size]`, made in inference mode; or
            None.

        Raises:
            ValueError: token_ids does not fit the batch, the cache does not fit the model, or
                logits is another word.
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
        return _scaled(project(hidden, *self._weights.head).float(), 1 / self._logits_scaling)

    @property
    def has_parameters(self) -> bool:
        """Whether the model's parameters hold their values, so that unpatched calls work."""
        return self._weights.has_parameters

    @property
    def weight_bytes(self) -> int:
        """Bytes of the projections' weights as a forward reads them, the head's included."""
        return self._weights.num_bytes

    def addresses(self, longest: int) -> tuple[int, ...]:
        """As `ModelHandle.addresses`."""
        self._check_model()
        # These two are looked up in each forward: they may have become other objects.
        found = (self._weights.embedding, norm_of(self._decoder.model.norm)[0])
        tensors = itertools.chain(self._fixed, found)
        return (*self._rotary.addresses(longest), *map(torch.Tensor.data_ptr, tensors))

    def twin(self) -> PatchedLlama:
        """A handle on the same patch whose `forward` another thread may call meanwhile; use it only
        until `undo`."""
        twin = object.__new__(PatchedLlama)
        twin.__dict__.update(self.__dict__)
        # The only part of a forward that has state.
        twin._rotary = copy.deepcopy(self._rotary)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """As the unpatched model, to be patched where it arrives."""
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
        """Make the model what it was before: its forward method, and its parameters, the same
        objects with the same bits, each with memory of its own again. Undoing twice does
        nothing.

        Weights that were rounded to int8 and not kept are gone: the model's parameters stay without
        values, and whoever reads them is told so.
        """
        forward, self._forward = self._forward, None
        if forward is None:
            return
        forward.handle = None
        # Someone may have hidden our forward in turn; then theirs stays and ours just passes calls
        # on.
        if self.model.__dict__.get("forward") is forward:
            if self._hidden_forward is None:
                del self.model.forward
            else:
                self.model.forward = self._hidden_forward
        with torch.inference_mode(False), torch.no_grad():
            # The last references to a weight go before it is restored.
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


class PatchedForward:
    """`model.forward` while patched: packed when `batch` is given, else what it was.

    An object and not a closure, so that a copy of a patched model, which is not patched, calls the
    copy. Its signature is that of the original, which `generate` looks at.
    """

    def __init__(self, handle: PatchedLlama, original: Callable[..., Any]) -> None:
        self.handle: PatchedLlama | None = handle
        self.original = original
        functools.update_wrapper(self, original)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model has no owner who could undo its patch: it comes out plain."""
        return _as_it_was, (self.original,)

    def __call__(
        self,
        *args: Any,
        batch: PackedBatch | None = None,
        cache: Any = None,
        logits: str = "last",
        **kwargs: Any,
    ) -> Any:
        if batch is None and not isinstance(cache, kernels.KVCache):
            if self.handle is not None and not self.handle.has_parameters:
                if self.handle.weight_dtype is not None:
                    raise RuntimeError(
                        "model.forward: the model's weights were rounded to int8 for the patched "
                        "pass, and its own values are gone; load the model again, or patch it with "
                        "patch_llama(model, weight_dtype='int8', keep_parameters=True)"
                    )
                raise RuntimeError(
                    "model.forward: the model's weights are packed for the patched pass; undo the "
                    "patch (the relay's close, or the handle's undo), or patch with "
                    "patch_llama(model, keep_parameters=True), before an unpatched call"
                )
            # From transformers 5.24 on, a model's own cache has this name too.
            return self.original(*args, **({} if cache is None else {"cache": cache}), **kwargs)
        token_ids = args[0] if args else kwargs.pop("input_ids", None)
        if batch is None or cache is None or token_ids is None or kwargs or len(args) > 1:
            raise ValueError(
                "model.forward: a packed call must be (input_ids, batch=..., cache=..., "
                f"logits=...), got {len(args)} positional arguments, batch {type(batch).__name__}, "
                f"cache {type(cache).__name__} and {sorted(kwargs) or 'nothing'} besides"
            )
        if self.handle is None:
            raise RuntimeError("model.forward: the patch was undone; call patch_llama again")
        computed = self.handle.forward(token_ids.reshape(-1), batch, cache, logits=logits)
        return CausalLMOutputWithPast(logits=computed)


def _as_it_was(original: Callable[..., Any]) -> Callable[..., Any]:
    return original


def _patched(
    kind: type[PreTrainedModel], state: dict[str, Any], options: dict[str, Any]
) -> PatchedLlama:
    model = kind.__new__(kind)
    model.__dict__.update(state)
    return patch_llama(model, **options)


def _scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """`x * factor`, rounded once; x itself where that is 1."""
    return x if factor == 1.0 else x * factor
