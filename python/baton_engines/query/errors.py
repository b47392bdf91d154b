"""What the relay does with exceptions that end a query and not the run."""


def is_failure(error: BaseException) -> bool:
    """Whether something went wrong, as opposed to somebody who wants the program to stop.

    A panic in a library written in Rust (tokenizers, safetensors) is not an `Exception`, but
    concerns one query or one file all the same.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def drop_tracebacks(error: BaseException | None) -> None:
    """Let go of the frames that an error and its causes came through, and of their tensors."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def explained(text: str, cause: BaseException) -> RuntimeError:
    """The relay's error with that text, caused by another."""
    error = RuntimeError(f"Relay: {text}")
    error.__cause__ = cause
    return error
