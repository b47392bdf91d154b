"""A query's tokens or text as iterators, while the relay runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..query import Query
from ..query.stopping import Stopper, TextPieces


def tokens_of(query: Query, step: Callable[[], object]) -> Iterator[int]:
    """The query's tokens as they come.

    Args:
        query: Query.
        step: called whenever there is no new token and the query has not ended.

    Raises:
        Exception: the query's error if it fails, after its last token; or what `step` raises.
    """
    given = 0
    while True:
        while given < len(query.tokens):
            yield query.tokens[given]
            given += 1
        if query.ended:
            break
        step()
    if query.error is not None:
        raise query.error.with_traceback(None)


def text_of(query: Query, tokenizer, step: Callable[[], object]) -> Iterator[str]:
    """The query's text in pieces, each as soon as it is certain; together they are `Query.text`.

    Args:
        query: Query.
        tokenizer: of Hugging Face.
        step: see `tokens_of`.

    Raises:
        Exception: see `tokens_of`; the text so far comes first.
    """
    pieces = TextPieces(Stopper(tokenizer=tokenizer) if query.ended else query.serving.stopper)
    error = None
    try:
        for token in tokens_of(query, step):
            if not query.ended and (piece := pieces.push(token)):
                yield piece
    except Exception as caught:
        error = caught
    if query.ended and (rest := pieces.finish(query.text or "")):
        yield rest
    if error is not None:
        raise error
