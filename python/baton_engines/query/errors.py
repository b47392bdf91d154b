"""What the relay does with exceptions that end a query and not the run."""


def drop_tracebacks(error: BaseException | None) -> None:
    """Let go of the frames that an error and its causes came through, and of their tensors."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def explained(text: str, cause: Exception) -> RuntimeError:
    """The relay's error with that text, caused by another."""
    error = RuntimeError(f"relay: {text}")
    error.__cause__ = cause
    return error
