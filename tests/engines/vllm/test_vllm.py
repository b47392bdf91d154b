"""vLLM on our attention, run for real: `make test-engines`, which makes its environment.

vLLM brings its own torch and transformers, hence the other process; it finds our entry
points in a folder that is made here, as it would find them in an installed package. Prompts of more
than 16 tokens are prefilled in chunks, and prompts with a known beginning of a page reuse it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import make

from baton_engines.llama.load import smollm2_folder

ROOT = Path(__file__).resolve().parents[3]
CHILD = ROOT / "tests" / "support" / "vllm_child.py"
PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="needs an environment with vLLM, which `make test-engines` makes"
)

# With the sizes that vLLM's own kernel needs. Gemma 3 has one layer in six without a window.
MODELS = {
    "llama": {},
    "qwen3": {},
    "gemma3": {"num_hidden_layers": 6},
    "gemma2_softcap": {},
    "mistral_window": {},
    "gpt_oss_sinks": {},
    # The trained one, as it is.
    "smollm2": None,
}
NEW_TOKENS = 24
# Seconds of a process with a few engines, each of which takes up to a minute to load.
TIME_LIMIT = 600
OURS, THEIRS = {"attention_backend": "CUSTOM"}, {"attention_backend": "CPU_ATTN"}


def prompts():
    """Several lengths, then some with a beginning that is in the cache by then."""
    generator = torch.Generator().manual_seed(1)
    first = [
        torch.randint(5, 320, (length,), generator=generator).tolist()
        for length in (27, 3, 40, 12, 33, 8)
    ]
    return [first, [[*first[2], 7, 9], [*first[4], 11], first[2]]]


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """A function that answers a list of runs in one process of vLLM's environment."""
    folder = tmp_path_factory.mktemp("vllm")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    def serve(runs, **environment):
        for run in runs:
            model = folder / run["model"]
            sizes = MODELS[run["model"]]
            if sizes is None and not model.exists():
                model.symlink_to(smollm2_folder(), target_is_directory=True)
            elif not model.exists():
                make(run["model"], head_dim=32, **sizes).save_pretrained(model)
        source, target = folder / "runs.json", folder / "answers.json"
        works = [
            {
                "batches": prompts(),
                "max_tokens": NEW_TOKENS,
                **run,
                "model": str(folder / run["model"]),
            }
            for run in runs
        ]
        source.write_text(json.dumps(works))
        target.unlink(missing_ok=True)
        done = subprocess.run(
            [PYTHON, str(CHILD), str(source), str(target)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python", folder))),
                # In one process, unless a run has more ranks.
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                # Functions are sent to the workers, which count calls.
                "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_LOGGING_LEVEL": "ERROR",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(target.read_text())

    return serve


def tokens(answer):
    assert "error" not in answer, answer
    return [[one["tokens"] for one in batch] for batch in answer["answers"]]


def calls(answer):
    return [worker["calls"] for worker in answer["workers"]]


@pytest.mark.parametrize("model", MODELS)
def test_tokens_are_those_of_vllms_own_attention(serve, model):
    """Both greedy in float32. A plugin that vLLM could not load would pass but for the calls."""
    theirs, ours = serve([{"model": model, "options": options} for options in (THEIRS, OURS)])
    assert tokens(ours) == tokens(theirs)
    assert calls(theirs) == [0] and calls(ours)[0] >= NEW_TOKENS
    hits = [one["cached"] for one in ours["answers"][1]]
    assert hits == [32, 32, 32]


@pytest.mark.parametrize("model", ["llama"])
def test_bfloat16(serve, model):
    """Log-probabilities of prompts in chunks, and of the tokens decoded after them, are at most
    twice as far from those of float32 as with vLLM's own attention. Greedy tokens are not compared
    in bfloat16, because neighboring logits are often equal."""
    asked, _ = prompts()
    work = {"model": model, "batches": [asked], "prompt_logprobs": True}
    theirs, ours = serve(
        [{**work, "options": {**options, "dtype": "bfloat16"}} for options in (THEIRS, OURS)]
    )
    assert "error" not in ours and "error" not in theirs, (ours, theirs)
    assert calls(theirs) == [0] and calls(ours)[0] >= NEW_TOKENS

    def whole(answer):
        pairs = zip(asked, answer["answers"][0], strict=True)
        return [prompt + one["tokens"] for prompt, one in pairs]

    batches = [whole(theirs), whole(ours)]
    (exact,) = serve([{**work, "options": THEIRS, "batches": batches, "max_tokens": 1}])
    assert "error" not in exact, exact

    def error(answer, right):
        found = [one["prompt_logprobs"] + one["logprobs"] for one in answer["answers"][0]]
        right = [one["prompt_logprobs"] for one in right]
        assert list(map(len, found)) == list(map(len, right))
        pairs = zip(map(torch.tensor, found), map(torch.tensor, right), strict=True)
        return torch.cat([a - b for a, b in pairs]).square().mean().sqrt().item()

    errors = [error(*pair) for pair in zip((theirs, ours), exact["answers"], strict=True)]
    assert 0 < errors[1] <= 2 * errors[0], errors


def test_nothing_changes_unasked(serve):
    """Installed, its entry points found, and vLLM's own attention runs."""
    (answer,) = serve([{"model": "llama"}])
    assert calls(answer) == [0] and answer["workers"][0]["layers"] is False


def test_the_override(serve):
    theirs = serve([{"model": "llama"}])
    ours = serve([{"model": "llama"}], BATON_VLLM="override")
    assert tokens(ours[0]) == tokens(theirs[0])
    assert calls(ours[0])[0] > 0


def test_what_cannot_be_served_is_refused(serve):
    (answer,) = serve([{"model": "llama", "options": {**OURS, "kv_cache_dtype": "fp8"}}])
    assert "CUSTOM does not fit: kv_cache_dtype not supported" in answer["error"]


def test_two_ranks(serve):
    alone, both = serve(
        [
            {"model": "llama", "options": {**OURS, **more}}
            for more in ({}, {"tensor_parallel_size": 2})
        ]
    )
    assert tokens(both) == tokens(alone)
    assert len(calls(both)) == 2 and min(calls(both)) > 0


@pytest.mark.parametrize("eager", [True, False])
def test_batch_invariance(serve, eager):
    """Log-probabilities have the bits of a request by itself, in a batch of 32, with its beginning
    in the cache and without."""
    asked, later = prompts()
    generator = torch.Generator().manual_seed(2)
    others = [
        torch.randint(5, 320, (3 + i,), generator=generator).tolist()
        for i in range(32 - len(asked))
    ]
    batches = [[prompt] for prompt in asked]
    batches += [asked + others, later] + [[prompt] for prompt in later]
    options = {**OURS, "enforce_eager": eager, "max_num_seqs": 32, "max_num_batched_tokens": 48}
    (answer,) = serve(
        [{"model": "llama", "options": options, "batches": batches}],
        BATON_VLLM="invariant",
        OMP_NUM_THREADS="2",
    )
    assert "error" not in answer, answer
    assert answer["workers"][0]["layers"] is True and calls(answer)[0] > 0
    # The ops are on torch's threads.
    assert answer["workers"][0]["helpers"] == 0
    answers = answer["answers"]
    alone = [one for batch in answers[: len(asked)] for one in batch]
    assert len(answers[len(asked)]) == 32
    together = answers[len(asked)][: len(asked)]
    assert [one["logprobs"] for one in together] == [one["logprobs"] for one in alone]
    # The third prompt: computed whole at first, then with its first page from the cache.
    whole, again = alone[2], answers[len(asked) + 1][2]
    assert whole["cached"] == 0 and again["cached"] == 32
    assert again["logprobs"] == whole["logprobs"]
    known = [one for batch in answers[len(asked) + 2 :] for one in batch]
    assert [one["logprobs"] for one in known] == [
        one["logprobs"] for one in answers[len(asked) + 1]
    ]
