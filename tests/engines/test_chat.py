"""Conversations as users send them: content in parts, tools, images, answers to be continued."""

import json

import pytest
from tiny_model import byte_tokenizer, save_tiny_model
from typer.testing import CliRunner

from baton_engines.cli.main import app
from baton_engines.cli.prompts_io import PromptRecord, parse_object
from baton_engines.query.chat import ContentError, plain_messages

TOKENIZER = byte_tokenizer()


def user(content) -> dict:
    return {"role": "user", "content": content}


def text_of(*messages, **fields) -> str:
    """The text that the model reads."""
    record = parse_object({"messages": list(messages), **fields}, 1, 1)
    assert record.error is None
    return TOKENIZER.decode(record.encode(TOKENIZER))


@pytest.mark.parametrize(
    "content",
    [
        "hi there",
        [{"type": "text", "text": "hi there"}],
        [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}],
        [{"type": "input_text", "text": "hi"}, " there"],
        [{"text": "hi there"}],
    ],
)
def test_parts_of_text_are_joined(content):
    assert text_of(user(content)) == "user:hi there\nassistant:"


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (
            user([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]),
            "messages[0].content[1] must be a part of type text, got 'image_url': images are not",
        ),
        (user([{"type": "input_audio"}]), "a part of type text, got 'input_audio'"),
        (user([{"type": "text"}]), "messages[0].content[0].text must be a string, got NoneType"),
        (user([3]), "messages[0].content[0] must be a part of type text, got 'int'"),
        (user({"text": "a"}), "messages[0].content must be a string or a list of parts, got dict"),
        (
            {"role": "tool", "content": "4"},
            "messages[0].role must be system, user or assistant, got 'tool': tools are not su",
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
            "messages[0].tool_calls must be left out, got one: tools are not supported",
        ),
    ],
)
def test_what_is_no_text_is_refused_by_name(message, error):
    with pytest.raises(ContentError) as caught:
        plain_messages([message])
    assert error in str(caught.value)


def test_the_assistants_last_words_are_continued():
    words = {"role": "assistant", "content": "The answer is"}
    assert text_of(user("2+2?"), words) == "user:2+2?\nassistant:The answer is"
    parts = {"role": "assistant", "content": [{"type": "text", "text": "The answer is"}]}
    assert text_of(user("2+2?"), parts) == "user:2+2?\nassistant:The answer is"
    # Unless the option says otherwise.
    closed = text_of(user("2+2?"), words, continue_final_message=False)
    assert closed == "user:2+2?\nassistant:The answer is\nassistant:"
    assert text_of(user("a story: "), continue_final_message=True) == "user:a story: "


def test_a_last_message_that_the_template_hides_cannot_be_continued():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    record = PromptRecord(1, messages=[user("a"), {"role": "assistant", "content": "b"}])
    with pytest.raises(ValueError, match="cannot be tokenized .*continue_final_message"):
        record.encode(tokenizer)


def test_messages_are_not_changed():
    messages = [user([{"type": "text", "text": "a"}])]
    copied = json.loads(json.dumps(messages))
    text_of(*messages)
    assert messages == copied


def test_a_conversation_that_is_refused_fails_its_query_only(tmp_path):
    save_tiny_model(tmp_path)
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    lines = [{"messages": [user(image)]}, {"messages": [user([{"type": "text", "text": "hi"}])]}]
    result = CliRunner().invoke(
        app,
        ["generate", "--model", str(tmp_path), "--max-new-tokens", "2"],
        input="".join(json.dumps(line) + "\n" for line in lines),
    )
    refused, answered = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 1
    assert "line 1: messages[0].content[0] must be a part of type text" in refused["error"]
    assert answered["prompt_tokens"] == len("user:hi\nassistant:")
