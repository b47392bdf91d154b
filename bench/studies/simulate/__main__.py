"""The study of docs/simulation.md, and the validation of its cost model.

`python -m bench.simulate` simulates the relay's policies on published GPUs and prints ratios to
Orca, with the assumptions behind each. No GPU is measured: every figure follows from the cost model
and its stated efficiency factors.

`python -m bench.simulate --validate` times forwards of SmolLM2 on this machine, predicts from them
the relay's behavior under every policy, runs the relay, and prints both.

`python -m bench.simulate --bound` times the same forwards and prints, for this machine and for an
H100, what no schedule can exceed, and where prefill next to decoding can pay at all.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--validate", action="store_true", help="against the relay, here")
    parser.add_argument("--bound", action="store_true", help="of any schedule, here and on an H100")
    parser.add_argument("--figures", type=Path, help="folder for PNG figures of the study")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="of the study")
    parser.add_argument("--model", default="smollm2", help="to validate with")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--slots", type=int, default=8, help="of the validation")
    parser.add_argument("--queries", type=int, default=24, help="of the validation")
    parser.add_argument("--threads", type=int, default=1, help="of the validation")
    arguments = parser.parse_args(argv)
    if arguments.validate:
        return _validate(arguments)
    if arguments.bound:
        return _bound(arguments)
    # Imported here, as below: a study needs no model, a validation no figures.
    from .study import run_study

    run_study(processes=arguments.processes, figures=arguments.figures)
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    import torch

    from baton_engines.llama import patch_llama
    from baton_engines.llama.load import load_model

    from ... import describe_run
    from ...workloads import longest, orca
    from .measured import calibrate
    from .validate import print_case, print_summary, validate

    torch.set_num_threads(arguments.threads)
    # The time of a single thread excludes what other programs take from it.
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    model, _ = load_model(arguments.model, dtype=arguments.dtype)
    print(
        f"{arguments.model} in {arguments.dtype}, {arguments.slots} slots, {arguments.queries} "
        f"queries of Orca's lengths divided by 4, {clock.__name__} as clock\n{describe_run()}"
    )
    with patch_llama(model) as patched:
        begin = clock()
        cost, samples = calibrate(
            patched,
            max_rows=arguments.slots,
            max_length=longest(orca(arguments.queries, divisor=4)),
            clock=clock,
        )
        print(
            f"calibrated in {clock() - begin:.0f} s with {len(samples)} forwards; the fit is off "
            f"by {cost.error:.1%} in the median\n"
        )
        cases = validate(
            patched,
            cost,
            count=arguments.queries,
            num_slots=arguments.slots,
            clock=clock,
            report=print_case,
        )
    print_summary(cases)
    return 0


def _bound(arguments: argparse.Namespace) -> int:
    import torch

    from baton_engines.llama import patch_llama
    from baton_engines.llama.load import load_model

    from ... import describe_run
    from .bound import report
    from .costs import roofline
    from .measured import calibrate

    torch.set_num_threads(arguments.threads)
    model, _ = load_model(arguments.model, dtype=arguments.dtype)
    print(describe_run())
    with patch_llama(model) as patched:
        cost, _ = calibrate(patched, max_rows=64, max_length=256, repeats=1)
    print(f"\n{report(f'here, {arguments.model} in {arguments.dtype}', cost, 128)}")
    print(f"\n{report('H100, llama-7b (a roofline)', roofline('H100', 'llama-7b'), 512)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
