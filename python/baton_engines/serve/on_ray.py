"""Replicas of a relay on Ray Serve, behind one or more copies of OpenAI's interface.

If a replica is lost in the middle of a request, another replica continues it: an answer's tokens
depend only on its prompt, options and seed, so the other replica computes the same tokens, and
those that the client already has are left out. Serve itself repeats a request only until a replica
has accepted it.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError

from ..llama import load_model
from ..llama.load import load_tokenizer
from ..relay import Relay
from .app import make_app
from .engine import BadRequestError, Engine, Piece

# If this many replicas were lost with one request, the request itself is to blame.
_MAX_LOST_REPLICAS = 3
_HEALTH_CHECK_SECONDS = 2.0


class RelayReplica:
    """One relay; a deployment of Serve.

    Args:
        model: see `load_model`.
        options: of the `Relay`.
    """

    def __init__(self, model: str, options: dict[str, Any]):
        loaded, tokenizer = load_model(model)
        self._engine = Engine(lambda: Relay(loaded, tokenizer=tokenizer, **options))

    async def generate(self, prompt: Sequence[int], options: dict[str, Any]) -> AsyncIterator[Any]:
        """Pieces of the answer; for an invalid request, only the error."""
        try:
            async for piece in self._engine.generate(prompt, **options):
                yield piece
        except BadRequestError as error:
            yield error

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica if this raises."""
        self._engine.check()


class Replicas:
    """The replicas as one `Generator`.

    Args:
        handle: of the deployment.
    """

    def __init__(self, handle: Any):
        self._generate = handle.generate.options(stream=True)

    def check(self) -> None:
        """Does nothing: Serve monitors its replicas itself."""

    async def generate(self, prompt: Sequence[int], **options: Any) -> AsyncIterator[Piece]:
        """See `Engine.generate`.

        Raises:
            RayActorError: several replicas were lost with this request.
        """
        if options.get("seed") is None:
            # Fixed here, so that it is the same wherever the request continues.
            options["seed"] = random.getrandbits(31)
        num_chars = num_tokens = num_lost = 0
        while True:
            # How much of the answer this replica has repeated.
            chars = tokens = 0
            pieces = self._generate.remote(list(prompt), options)
            try:
                async for piece in pieces:
                    if isinstance(piece, BadRequestError):
                        raise piece
                    ends = piece.finish_reason is not None
                    new = _after(piece, num_chars - chars, num_tokens - tokens)
                    chars += len(piece.text)
                    tokens += len(piece.tokens)
                    num_chars, num_tokens = max(num_chars, chars), max(num_tokens, tokens)
                    if new.text or ends:
                        yield new
                    if ends:
                        return
            except (RayActorError, RayTaskError) as error:
                num_lost += 1
                if not _is_lost(error) or num_lost > _MAX_LOST_REPLICAS:
                    raise
            finally:
                # Has no effect once the answer has ended.
                pieces.cancel()


def deployment(
    model: str,
    *,
    name: str | None = None,
    capacity: int,
    num_slots: int = 16,
    max_waiting: int = 256,
    num_replicas: int = 1,
    autoscaling_config: dict[str, Any] | None = None,
    ray_actor_options: dict[str, Any] | None = None,
    num_frontends: int = 1,
    **options: Any,
) -> serve.Application:
    """An application for `serve.run`.

    Args:
        model: see `load_model`; a folder must exist on every node.
        name: the model's name for clients; default: `model`.
        capacity: see `Relay`.
        num_slots: see `Relay`; also the requests per replica that Serve scales to.
        max_waiting: requests that a replica accepts beyond its slots.
        num_replicas: the number of relays, without autoscaling.
        autoscaling_config: of Serve, for example `{"min_replicas": 1, "max_replicas": 4}`. Its
            signal is the number of requests of a replica, including those that wait for a slot;
            the target is `num_slots` unless the config sets one.
        ray_actor_options: of the replicas; default: one CPU each.
        num_frontends: processes that accept requests.
        options: of the `Relay`.
    """
    scaling: dict[str, Any] = {"num_replicas": num_replicas}
    if autoscaling_config is not None:
        scaling = {
            "autoscaling_config": {"target_ongoing_requests": num_slots, **autoscaling_config}
        }
    relay = {"capacity": capacity, "num_slots": num_slots, **options}
    # Serve's types do not distinguish a decorator from its result.
    make: Any = serve.deployment
    replicas = make(
        RelayReplica,
        max_ongoing_requests=num_slots + max_waiting,
        ray_actor_options=ray_actor_options or {"num_cpus": 1},
        health_check_period_s=_HEALTH_CHECK_SECONDS,
        **scaling,
    ).bind(model, relay)

    def build() -> Any:
        application = serve.get_replica_context().app_name
        handle = serve.get_deployment_handle(RelayReplica.__name__, application)
        return make_app(Replicas(handle), load_tokenizer(model), name or model, capacity)

    frontend = make(
        serve.ingress(build)(),
        name="OpenAI",
        num_replicas=num_frontends,
        # They hold requests and compute nothing.
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
    )
    return frontend.bind(replicas)


def _is_lost(error: Exception) -> bool:
    """Whether the error means that the replica is gone, rather than that the answer failed."""
    return isinstance(error, RayActorError) or isinstance(
        getattr(error, "cause", None), RayActorError
    )


def _after(piece: Piece, num_chars: int, num_tokens: int) -> Piece:
    """The part of a piece that the client has not received yet."""
    num_chars, num_tokens = max(0, num_chars), max(0, num_tokens)
    logprobs = None if piece.logprobs is None else piece.logprobs[num_tokens:]
    return piece._replace(
        text=piece.text[num_chars:], tokens=piece.tokens[num_tokens:], logprobs=logprobs
    )
