"""Whether an engine's answer to a prompt depends on what else the engine is doing.

A prompt is sent by itself first and then again in company: in batches of several sizes, in another
order, next to long prompts, after prompts with the same beginning, and while others arrive or are
cancelled. `audit` compares every answer with the first one, token by token and log-probability by
log-probability. The engine is a `Target`: a server with OpenAI's interface, a transformers model, a
relay, or vLLM in this process.
"""

from .audit import AxisResult, Finding, audit
from .axes import Axis, Batch, make_axes
from .target import Answer, Request, Target, TargetError, UnsupportedError

__all__ = [
    "Answer",
    "Axis",
    "AxisResult",
    "Batch",
    "Finding",
    "Request",
    "Target",
    "TargetError",
    "UnsupportedError",
    "audit",
    "make_axes",
]
