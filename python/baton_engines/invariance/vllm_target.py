"""vLLM in this process as a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .target import Answer, Request, TargetError


class VllmTarget:
    """vLLM's engine, step by step.

    Args:
        model: folder or name.
        options: arguments of `vllm.LLM`, e.g. dtype.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(self, model: str, **options: Any):
        from vllm import LLM, SamplingParams

        self.name = f"vLLM, {model}"
        self._parameters = SamplingParams
        self._engine = LLM(model=model, **options).llm_engine
        self._next = 0

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """See `Target.ask`."""
        names: list[str] = []
        last: dict[str, Any] = {}
        ended: set[str] = set()
        while True:
            for request in requests[len(names) :]:
                if names and _count(last.get(names[-1])) < request.after and names[-1] not in ended:
                    break
                names.append(self._add(request))
            if len(names) == len(requests) and ended.issuperset(names):
                return [_answer(last.get(name), self.name) for name in names]
            for output in self._engine.step():
                last[output.request_id] = output
                if output.finished:
                    ended.add(output.request_id)
            for name, request in zip(names, requests, strict=False):
                limit = request.cancel_after
                if limit is not None and name not in ended and _count(last.get(name)) >= limit:
                    self._engine.abort_request([name])
                    ended.add(name)

    def _add(self, request: Request) -> str:
        name = str(self._next)
        self._next += 1
        parameters = self._parameters(temperature=0.0, logprobs=0, max_tokens=request.max_tokens)
        self._engine.add_request(name, request.prompt, parameters)
        return name


def _count(output: Any) -> int:
    return 0 if output is None else len(output.outputs[0].token_ids)


def _answer(output: Any, name: str) -> Answer:
    if output is None:
        raise TargetError(f"{name}: a request got no answer")
    (result,) = output.outputs
    tokens = tuple(result.token_ids)
    entries = zip(tokens, result.logprobs or (), strict=False)
    return Answer(tokens, tuple(entry[token].logprob for token, entry in entries))
