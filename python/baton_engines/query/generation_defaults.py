"""The settings of a model's generation config for queries that do not set them.

`generate` applies them by default, so a model that was tuned with a repetition penalty, or that
must not generate some tokens, answers here as it does there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# The top_k with which `generate` samples by default.
_TOP_K_OF_GENERATE = 50
_DEFAULT_NEW_TOKENS = 128
_COPIED = ("top_p", "min_p", "repetition_penalty", "suppress_tokens", "begin_suppress_tokens")
# Settings that would change an answer, and the values with which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "bad_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
    "typical_p": (None, 1.0),
    "top_h": (None,),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "watermarking_config": (None,),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "diversity_penalty": (None, 0.0),
    "constraints": (None,),
    "force_words_ids": (None,),
    "token_healing": (None, False),
    "max_time": (None,),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """The settings of a generation config that apply to a query.

    Attributes:
        eos: end-of-sequence ids.
        max_new_tokens: the most tokens of an answer.
        min_length: the fewest tokens of prompt and answer together before it may end.
        stop: strings that end an answer.
        sampling: by the names of `SamplingOptions`; without a temperature.
        temperature: for a query that sets none.
        top_k: for a query that sets neither temperature nor top_k.
    """

    eos: tuple[int, ...] = ()
    max_new_tokens: int = _DEFAULT_NEW_TOKENS
    min_length: int = 0
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 0.0
    top_k: int = 0

    @classmethod
    def of(cls, config: Any | None, eos: int | Iterable[int] | None = None) -> GenerationDefaults:
        """The settings of a transformers GenerationConfig; None means no config.

        Args:
            config: GenerationConfig.
            eos: end-of-sequence ids where the config names none.

        Raises:
            NotImplementedError: the config has a setting that would change answers and that only
                `generate` supports.
        """
        told = getattr(config, "eos_token_id", None)
        eos = eos if told is None else told
        ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        if config is None:
            return cls(ids)

        def get(name: str, default: Any = None) -> Any:
            value = getattr(config, name, None)
            return default if value is None else value

        for name, neutral in _NEUTRAL.items():
            if getattr(config, name, None) not in neutral:
                raise NotImplementedError(
                    f"Relay: generation_config.{name} must be unset, got {get(name)!r}; set it to "
                    "None, or give the relay a generation_config without it"
                )
        sampling = {name: get(name) for name in _COPIED if get(name) is not None}
        sampling["min_new_tokens"] = get("min_new_tokens", 0)
        if (bias := _single_biases(get("sequence_bias"))) is not None:
            sampling["logit_bias"] = bias
        if get("top_k") is not None:
            sampling["top_k"] = get("top_k")
        stop = get("stop_strings", ())
        samples = bool(get("do_sample", False))
        return cls(
            eos=ids,
            max_new_tokens=get("max_new_tokens", _DEFAULT_NEW_TOKENS),
            min_length=get("min_length", 0),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            sampling=sampling,
            temperature=float(get("temperature", 1.0)) if samples else 0.0,
            top_k=get("top_k", _TOP_K_OF_GENERATE) if samples else 0,
        )

    def fill(self, given: Mapping[str, Any], prompt_length: int) -> dict[str, Any]:
        """The sampling options of a query; its own take precedence.

        Args:
            given: by the names of `SamplingOptions`; None for options that the query does not set.
            prompt_length: in tokens.
        """
        own = {name: value for name, value in given.items() if value is not None}
        options = {**self.sampling, **own}
        if "temperature" not in own:
            options["temperature"] = self.temperature
            options.setdefault("top_k", self.top_k)
        if "min_new_tokens" not in own:
            fewest = max(options.get("min_new_tokens", 0), self.min_length - prompt_length)
            options["min_new_tokens"] = fewest
        return options


def _single_biases(biases: Any) -> dict[int, float] | None:
    """sequence_bias, converted to a bias of single tokens."""
    if not biases:
        return None
    pairs = biases.items() if isinstance(biases, Mapping) else biases
    single = {}
    for ids, bias in pairs:
        if len(ids) != 1:
            raise NotImplementedError(
                "Relay: generation_config.sequence_bias must be of single tokens, got a sequence "
                f"of {len(ids)}"
            )
        single[int(ids[0])] = float(bias)
    return single
