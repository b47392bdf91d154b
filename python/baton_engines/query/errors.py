"""Handles exceptions that end a query but not the run."""


def is_failure(error: BaseException) -> bool:
    """Whether the exception is an error, as opposed to a request to stop the program.

    A panic in a library written in Rust (tokenizers, safetensors) is not an `Exception`, but it
    concerns only one query or one file.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def drop_tracebacks(error: BaseException | None) -> None:
    """Drop the frames of an error and its causes, and with them their tensors."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def explained(text: str, cause: BaseException) -> RuntimeError:
    """The relay's error with that text and cause."""
    error = RuntimeError(f"Relay: {text}")
    error.__cause__ = cause
    return error
