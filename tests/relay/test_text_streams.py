"""Text as it comes: complete characters, nothing that is withdrawn later, and complete in the
end."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import TOKENIZERS, byte_fallback
from tiny_model import EOS, byte_tokenizer

from baton_engines import Relay
from baton_engines.query import decode_text
from baton_engines.query.chat import end_of_turn
from baton_engines.query.stopping import Stopper, TextPieces, make_stopper
from baton_engines.testing import FakeLlama

TEXT = "One fish 🐟, two 魚.\n\nUser: STOP é"


class Speaker(FakeLlama):
    """Says the given tokens, for any prompt."""

    def __init__(self, tokens, vocab_size=EOS + 8, eos=None):
        super().__init__(vocab_size=vocab_size, eos=eos)
        self.tokens = list(tokens)

    def logits_of(self, tokens):
        logits = torch.zeros(self.vocab_size)
        said = len(tokens) - 1
        logits[self.tokens[said] if said < len(self.tokens) else 0] = 9.0
        return logits


def said(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def speak(tokenizer, tokens, **options):
    relay = Relay(Speaker(tokens), 2, 512, tokenizer=tokenizer)
    pieces = []
    query = relay.submit(
        [1],
        max_new_tokens=len(tokens),
        on_text=lambda query, piece: pieces.append(piece),
        **{"eos": None, **options},
    )
    streamed = list(relay.stream_text(query))
    assert query.status == "finished", query.error
    assert streamed == pieces and all(pieces)
    assert "".join(pieces) == query.text
    return query, pieces


def test_pieces_are_complete_characters():
    tokenizer = byte_tokenizer()
    query, pieces = speak(tokenizer, said(tokenizer, TEXT))
    assert "".join(pieces) == query.text == TEXT
    assert len(pieces) == len(TEXT)


def test_text_of_a_running_query_has_no_half_characters():
    tokenizer = byte_tokenizer()
    relay = Relay(Speaker(said(tokenizer, TEXT)), 1, 512, tokenizer=tokenizer)
    query = relay.submit([1], max_new_tokens=len(said(tokenizer, TEXT)), eos=None)
    seen = []
    while relay.step():
        seen.append(query.text)
    assert not any("\ufffd" in text for text in seen)
    assert all(TEXT.startswith(text) for text in seen) and query.text == TEXT


def test_a_character_that_never_becomes_whole_is_shown_in_the_end():
    tokenizer = byte_tokenizer()
    query, pieces = speak(tokenizer, said(tokenizer, "fish 🐟")[:-1])
    assert pieces[-1] == query.text[5:] == "\ufffd"


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("\n\nUser:", "One fish 🐟, two 魚.", "stop"),
        ("\n\nUser!", TEXT, "length"),
        (["fish 🐟, three", " two"], "One fish 🐟,", "stop"),
        ([" O", "One"], "", "stop"),
    ],
)
def test_what_a_stop_string_takes_back_was_never_given(stop, text, reason):
    tokenizer = byte_tokenizer()
    query, pieces = speak(tokenizer, said(tokenizer, TEXT), stop=stop)
    assert ("".join(pieces), query.finish_reason) == (text, reason)


def test_what_a_stop_sequence_takes_back_was_never_given():
    tokenizer = byte_tokenizer()
    tokens = said(tokenizer, "abcabd")
    query, pieces = speak(tokenizer, tokens, stop=[tokens[3:6]])
    # The first two may be the beginning of the sequence.
    assert pieces == ["abc"] and query.finish_reason == "stop"
    query, pieces = speak(tokenizer, tokens, stop=[[*tokens[3:6], 0]])
    assert "".join(pieces) == "abcabd" and query.finish_reason == "length"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_are_a_growing_beginning_of_the_text(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = st.integers(0, len(tokenizer) - 1)
    tokens = data.draw(st.lists(ids, min_size=1, max_size=14))
    whole = decode_text(tokenizer, tokens)
    begin = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = [whole[begin : begin + 3] or "x", data.draw(st.text("abé .", min_size=1, max_size=3))]
    sequence = data.draw(st.lists(ids, min_size=1, max_size=3))
    stopper = make_stopper(None, [*stop, sequence], tokenizer)
    pieces, given = TextPieces(stopper), ""
    for count in range(1, len(tokens) + 1):
        if stopper.push(tokens[:count]) is not None:
            break
        given += pieces.push(tokens[count - 1])
    text = decode_text(tokenizer, tokens[:count]) if stopper.text is None else stopper.text
    rest = pieces.finish(text)
    if kind == "byte_fallback" and "\ufffd" in text:
        # One bad byte invalidates earlier good ones; what was given stays given.
        return
    assert given + rest == text


# Special tokens and first spaces


def test_a_stop_string_that_is_a_special_token():
    tokenizer = byte_tokenizer(("<|im_end|>", "<|user|>"))
    end, user = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|user|>"])
    tokens = [*said(tokenizer, "fine"), end, *said(tokenizer, "\nno"), user]
    for stop in ("<|im_end|>", "<|im_end|>\n", "e<|im_end|>", ["no<|user|>", "<|im_end|>"]):
        query, _ = speak(tokenizer, tokens, stop=stop)
        assert query.finish_reason == "stop", stop
        assert query.text == ("fin" if stop == "e<|im_end|>" else "fine")
    query, pieces = speak(tokenizer, tokens, stop="no<|user|>")
    assert (query.text, query.finish_reason) == ("fine\n", "stop")
    query, _ = speak(tokenizer, tokens, stop="<|im_end|>!")
    assert (query.text, query.finish_reason) == ("fine\nno", "length")


def test_a_stop_string_that_begins_with_the_space_of_the_first_word():
    tokenizer = byte_fallback()
    one, two, fish = tokenizer.convert_tokens_to_ids(["▁one", "▁two", "▁fish"])

    def stopped(tokens, stop):
        stopper = make_stopper(None, stop, tokenizer)
        for count in range(1, len(tokens) + 1):
            if stopper.push(tokens[:count]):
                return count, stopper.text
        return None

    assert stopped([one, two], " one") == (1, "")
    assert stopped([one, two, fish], " two") == (2, "one")
    assert stopped([one, two, fish], [" three", " two fish"]) == (3, "one")
    assert stopped([one, two], "  one") is None


# The end of a turn

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_tokens_that_end_an_answer():
    tokenizer = byte_tokenizer(("<|im_start|>", "<|im_end|>"))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    # A template that ends turns with plain text gives no token.
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = TURNS
    assert end_of_turn(tokenizer) == end
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert end_of_turn(tokenizer) is None

    tokenizer.chat_template = TURNS
    for last in (end, tokenizer.eos_token_id, 7):
        tokens = [*said(tokenizer, "fine"), last, *said(tokenizer, "no")]
        relay = Relay(Speaker(tokens, eos=7), 1, 512, tokenizer=tokenizer)
        query = relay.submit([1], max_new_tokens=len(tokens))
        relay.run()
        assert (query.finish_reason, len(query.tokens)) == ("eos", 5)
    relay = Relay(Speaker(tokens, vocab_size=EOS + 1, eos=7), 1, 512, tokenizer=tokenizer)
    query = relay.submit([1], max_new_tokens=1)
    assert query.serving.stopper.eos == {7, EOS}


# Callbacks


async def wait(query, value):
    pass


async def generator(query, value):
    yield value


class AsyncCall:
    async def __call__(self, query, value):
        pass


@pytest.mark.parametrize("argument", ["on_token", "on_text"])
@pytest.mark.parametrize(
    "callback", [wait, generator, functools.partial(wait), AsyncCall(), AsyncCall().__call__]
)
def test_async_callbacks_are_refused(argument, callback):
    relay = Relay(FakeLlama(), 1, 24, tokenizer=byte_tokenizer())
    query = relay.submit([1], max_new_tokens=2, **{argument: callback})
    assert query.status == "failed"
    assert f"submit: {argument} must be a plain function, because it is not awaited" in str(
        query.error
    )


def test_a_callback_that_returns_a_coroutine_fails_its_query():
    relay = Relay(FakeLlama(), 1, 24)
    query = relay.submit([1], max_new_tokens=3, on_token=lambda query, token: wait(query, token))
    relay.run()
    assert "a callback must not return an awaitable" in str(query.error)


def test_text_needs_a_tokenizer():
    relay = Relay(FakeLlama(), 1, 24)
    query = relay.submit([1], on_text=print, max_new_tokens=2)
    assert "on_text must be None when the relay has no tokenizer" in str(query.error)
    query = relay.submit([1], max_new_tokens=2)
    with pytest.raises(ValueError, match="stream_text: relay must have a tokenizer"):
        relay.stream_text(query)


def test_on_text_that_raises_fails_its_query():
    tokenizer = byte_tokenizer()
    relay = Relay(Speaker(said(tokenizer, "abc")), 1, 24, tokenizer=tokenizer)

    def refuse(query, piece):
        raise OSError("gone")

    query = relay.submit([1], on_text=refuse, max_new_tokens=3, eos=None)
    relay.run()
    assert "on_text of query 0 must not raise, got OSError('gone')" in str(query.error)


def test_the_text_of_queries_that_do_not_finish():
    tokenizer = byte_tokenizer()
    tokens = said(tokenizer, "abcdef")
    relay = Relay(Speaker(tokens), 1, 24, tokenizer=tokenizer)
    pieces = []
    query = relay.submit(
        [1], stop="cdx", max_new_tokens=6, eos=None, on_text=lambda _, piece: pieces.append(piece)
    )
    stream = relay.stream_text(query)
    assert [next(stream), next(stream)] == ["a", "b"]
    while len(query.tokens) < 4:
        relay.step()
    relay.cancel(query)
    # Text that was held back turns out to be final.
    assert query.text == "abcd" and "".join(stream) == "cd"
    assert "".join(pieces) == "abcd"

    def fail(query, token):
        if len(query.tokens) == 3:
            raise ZeroDivisionError("three")

    query = relay.submit([1], max_new_tokens=6, eos=None, on_token=fail)
    stream, got = relay.stream_text(query), []
    with pytest.raises(RuntimeError, match="three"):
        for piece in stream:
            got.append(piece)
    assert "".join(got) == query.text == "abc"


def test_a_stream_begun_late_gives_all_of_the_text():
    tokenizer = byte_tokenizer()
    relay = Relay(Speaker(said(tokenizer, TEXT)), 1, 512, tokenizer=tokenizer)
    query = relay.submit([1], max_new_tokens=20, eos=None, stop="fish 🐟")
    for _ in range(4):
        relay.step()
    assert "".join(relay.stream_text(query)) == query.text == "One "
    assert "".join(relay.stream_text(query)) == query.text


def test_a_stopper_without_conditions():
    assert Stopper().push([1]) is None
