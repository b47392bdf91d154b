"""`bench.step` on a small model: every op occurs, the parts add up, and the limit by hand."""

import pytest
from bench_package import import_bench

from baton_engines import llama, patch_llama
from baton_engines.testing.small_llama import small_llama

step_bench = import_bench("step")
limit = import_bench("evaluation.limit")


def test_parts_of_a_step():
    before = llama.forward.kernels
    model = small_llama(max_position_embeddings=64, eos_token_id=None)
    with patch_llama(model) as patched:
        seconds, parts = step_bench.measure_step(patched, 3, 8, 3)
        assert "forward" not in vars(patched)
    assert llama.forward.kernels is before
    layers = model.config.num_hidden_layers
    calls = {part.name: part.calls for part in parts}
    assert calls == {
        # q, k and v in one; output; gate and up in one; down; and the logits.
        "linear": 4 * layers + 1,
        "ragged_attention": layers,
        "append_kv": layers,
        "rms_norm": 2 * layers + 1,
        "silu_and_mul": layers,
        step_bench.AROUND: 1,
        step_bench.RELAY: 1,
    }
    assert sum(part.seconds for part in parts) == pytest.approx(seconds)
    assert all(part.seconds > 0 for part in parts)
    assert [part.hot is None for part in parts] == [False] * 5 + [True] * 2


def test_limit_of_a_step():
    # Weights of 100 bytes at 10 bytes/s; 2 rows attend to 5 columns each, of 4 bytes and 1 flop.
    sizes = limit.Sizes(
        token_flops=1.0, logits_flops=1.0, pair_flops=1.0, weight_bytes=100.0, kv_bytes=4.0
    )
    ceiling = limit.Ceiling(flops=1e9, read_bytes=10.0)
    assert step_bench.limit_of_step(sizes, ceiling, 2, 4) == pytest.approx(10 + 2 * 5 * 4 / 10)


def test_the_report():
    parts = [
        step_bench.Part("linear", 9, 0.006, 0.005),
        step_bench.Part("rms_norm", 5, 0.002, 0.001),
        step_bench.Part(step_bench.RELAY, 1, 0.004),
    ]
    text = step_bench.report(0.012, parts, 0.003)
    assert "linear                                            9    6.000   50.0%    5.000" in text
    assert "2.00 x its ops timed hot; the limit is 3.000 ms, 25%" in text
    assert f"step  {'a' * 30}{'b' * 10}{'c' * 20}\nlimit {'#' * 15}\n" in text
