"""`baton generate --model FOLDER` for every kind of decoder: the tokens of eager attention.

| test | what it holds |
| --- | --- |
| kinds | prompts of three lengths through two slots give the model's own tokens, in float32 |
"""

import json

import hf_models
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from baton_engines.cli.main import app

LENGTHS = (27, 3, 14)
# Beyond the window of those that have one.
NEW = 10
# A character for each token, so that the text says which tokens there are.
LETTERS = [chr(0x4E00 + token) for token in range(320)]


def tokenizer():
    vocabulary = {letter: token for token, letter in enumerate(LETTERS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=LETTERS[0]))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_kinds(name, tmp_path):
    model = hf_models.make(name)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    prompts = [row[row != 0].tolist() for row in hf_models.prompts(LENGTHS)[0]]
    result = CliRunner().invoke(
        app,
        ["generate", "--model", str(tmp_path), "--slots", "2", "--capacity", "48",
         "--dtype", "float32", "--max-new-tokens", str(NEW)],
        input="".join(json.dumps({"token_ids": prompt}) + "\n" for prompt in prompts),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    answers = [json.loads(line)["text"] for line in result.stdout.splitlines()]
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        wanted = hf_models.generate(model, "eager", ids, torch.ones_like(ids), NEW)
        assert answer == "".join(LETTERS[token] for token in wanted[0]), len(prompt)
