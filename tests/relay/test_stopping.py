"""Stop ids, sequences and strings, found across token borders and never too late."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import TEXT, TOKENIZERS

from baton_engines.query import decode_text
from baton_engines.query.stopping import TextDecoder, make_stopper
from baton_engines.relay import Relay
from baton_engines.testing import FakeLlama


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_text_grows_to_what_decoding_at_once_gives(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = st.integers(0, len(tokenizer) - 1)
    if kind == "byte_level":
        characters = st.text("aé魚🐟 .\ufffd", max_size=4).map(
            lambda text: tokenizer.encode(text, add_special_tokens=False)
        )
    else:
        # Characters that the vocabulary lacks, so bytes, between words and noise.
        characters = st.text("aé魚🐟 .", max_size=4).map(
            lambda text: [2 + b for b in text.encode()]
        )
    parts = data.draw(st.lists(st.one_of(ids.map(lambda id: [id]), characters), max_size=12))
    tokens = [token for part in parts for token in part]
    decoder = TextDecoder(tokenizer)
    text = ""
    for token in tokens:
        text += decoder.push(token)
        assert text == decoder.text
    whole = decode_text(tokenizer, tokens)
    if kind == "byte_fallback" and "\ufffd" in whole:
        # One bad byte invalidates earlier good ones; what was shown stays shown.
        return
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"\ufffd"}


def test_characters_of_byte_tokens_come_out_whole():
    tokens = [2 + byte for byte in "é🐟魚🐠".encode()]
    decoder = TextDecoder(TOKENIZERS["byte_fallback"])
    pieces = [decoder.push(token) for token in tokens]
    assert [piece for piece in pieces if piece] == ["é", "🐟", "魚", "🐠"]


def test_endless_noise_is_not_held_back():
    tokenizer = TOKENIZERS["byte_level"]
    noise = tokenizer.convert_tokens_to_ids("ÿ")
    decoder = TextDecoder(tokenizer)
    for _ in range(200):
        decoder.push(noise)
        assert len(decoder._window) <= 64
    assert len(decoder.text) >= 180


def test_whole_text_comes_out_character_by_character():
    tokenizer = TOKENIZERS["byte_level"]
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    decoder = TextDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokens]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


def run_stopper(tokenizer, tokens, stop, eos=None):
    """How many tokens it takes, the reason, and the text."""
    stopper = make_stopper(eos, stop, tokenizer)
    for count in range(1, len(tokens) + 1):
        reason = stopper.push(tokens[:count])
        if reason is not None:
            return count, reason, stopper.text
    return None


def test_stop_strings_are_found_across_tokens_and_cut_off():
    tokenizer = TOKENIZERS["byte_level"]
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    for stop in ("fish. Ü", "\n\nUser", "STOP", "魚と", "🐠", "s", "e fish, t", " </s> "):
        count, reason, text = run_stopper(tokenizer, tokens, stop)
        assert reason == "stop" and text == TEXT[: TEXT.index(stop)]
        # As soon as the tokens spell it, and not before.
        assert stop in tokenizer.decode(tokens[:count])
        assert stop not in tokenizer.decode(tokens[: count - 1])
    assert run_stopper(tokenizer, tokens, "not there") is None
    assert run_stopper(tokenizer, tokens, ["nope", "two", "One fish"])[2] == ""
    # If two end in the same token, the one that begins earlier cuts.
    count, _, text = run_stopper(tokenizer, tokens, ["sh", "fish", "ish,"])
    assert text == "One "


def test_a_stop_string_inside_a_token_that_ends_in_half_a_character():
    class Bytes:
        """A token is any string of bytes."""

        def decode(self, tokens, **_):
            return b"".join(tokens).decode("utf-8", errors="replace")

    fish = "🐟".encode()
    for split in (1, 2, 3):
        tokens = [b"go ST", b"OP now " + fish[:split], fish[split:] + b"!"]
        stopper = make_stopper(None, "STOP", Bytes())
        assert stopper.push(tokens[:1]) is None
        assert (stopper.push(tokens[:2]), stopper.text) == ("stop", "go ")


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(list(TOKENIZERS)),
    seed=st.integers(0, 2**32),
    begin=st.integers(0, 20),
    length=st.integers(1, 6),
)
def test_any_piece_of_the_text_stops_at_its_first_occurrence(kind, seed, begin, length):
    tokenizer = TOKENIZERS[kind]
    generator = torch.Generator().manual_seed(seed)
    low = 258 if kind == "byte_fallback" else 30
    tokens = torch.randint(low, len(tokenizer), (15,), generator=generator).tolist()
    whole = decode_text(tokenizer, tokens)
    stop = whole[begin : begin + length]
    if not stop or "\ufffd" in stop:
        return
    # A decoder of SentencePiece drops the space before the first word. A stop string may begin with
    # this space, but not consist of it.
    lost = " " if tokenizer.convert_ids_to_tokens(tokens[0]).startswith("\u2581") else ""
    count, reason, text = run_stopper(tokenizer, tokens, stop)
    begin = (lost + whole).index(stop, 0 if len(stop) > 1 else len(lost))
    assert (reason, text) == ("stop", whole[: max(0, begin - len(lost))])
    assert stop not in decode_text(tokenizer, tokens[: count - 1])


def test_sequences_and_ids():
    tokenizer = TOKENIZERS["byte_level"]
    tokens = [41, 42, 43, 44]
    assert run_stopper(None, tokens, [tokens[1:3]]) == (3, "stop", None)
    assert run_stopper(None, tokens, [torch.tensor(tokens[1:3])]) == (3, "stop", None)
    assert run_stopper(None, tokens, [[999], tokens[2], [tokens[3]]])[0] == 3
    assert run_stopper(None, tokens, [tokens[1:3][::-1]]) is None
    text = tokenizer.decode(tokens[:1])
    assert run_stopper(tokenizer, tokens, [tokens[1:3]]) == (3, "stop", text)
    assert run_stopper(None, tokens, (), eos=tokens[1]) == (2, "eos", None)
    assert run_stopper(None, tokens, [tokens[1]], eos=[999, tokens[1]]) == (2, "eos", None)
    assert run_stopper(None, tokens, tokens[2]) == (3, "stop", None)
    assert run_stopper(None, tokens, None) is None


@pytest.mark.parametrize("aligned", [False, True], ids=["ragged", "aligned"])
def test_the_relay_ends_queries_at_their_stops(aligned):
    tokenizer = TOKENIZERS["byte_level"]
    model = FakeLlama(vocab_size=len(tokenizer))
    answer = model.decode_alone([7], 20)
    whole = decode_text(tokenizer, answer)
    stop = whole[9:11]
    relay = Relay(model, 2, 64, tokenizer=tokenizer, aligned=aligned)
    options = {"max_new_tokens": 20}
    by_text = relay.submit([7], stop=stop, **options)
    by_ids = relay.submit([7], stop=[answer[4:7]], **options)
    by_eos = relay.submit([7], eos=answer[8], stop=stop * 9, **options)
    free = relay.submit([7], stop=("never said", [answer[0]] * 5), **options)
    relay.run()
    assert by_text.text == whole[: whole.index(stop)]
    assert by_text.tokens == answer[: len(by_text.tokens)] != answer
    assert by_ids.tokens == answer[:7] and by_ids.text == decode_text(tokenizer, answer[:4])
    assert by_eos.tokens == answer[: answer.index(answer[8]) + 1]
    assert by_eos.text == decode_text(tokenizer, by_eos.tokens)
    assert (free.tokens, free.text) == (answer, whole)
    reasons = [query.finish_reason for query in (by_text, by_ids, by_eos, free)]
    assert reasons == ["stop", "stop", "eos", "length"]
    assert relay.cache.shape.used == ()


def test_a_tokenizer_that_raises_fails_its_query_alone():
    class Broken:
        def decode(self, tokens, **_):
            raise UnicodeError("no")

    model = FakeLlama()
    relay = Relay(model, 2, 32, tokenizer=Broken())
    bad = relay.submit([1], stop="x", max_new_tokens=3)
    good = relay.submit([2], stop=[[99]], max_new_tokens=3)
    relay.run()
    assert "tokenizer of query 0 must not raise, got UnicodeError('no')" in str(bad.error)
    assert good.tokens == model.decode_alone([2], 3)
