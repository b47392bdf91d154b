"""The evaluation: every policy on the same requests, compared with other engines and the limit.

`python -m bench.relay` runs all systems of `bench.evaluation.systems` on the default cells, checks
that they give the same tokens, prints tables, and writes results.json and pictures into `--output`.
`--quick` takes less than three minutes. `--models`, `--dtypes`, `--workloads`, `--slots` and
`--rates` choose other cells, in every combination.

`--from FILE` prints and draws an earlier run's results.json; `--markdown` prints its tables for a
document, `--fill docs/evaluation/tables.md` writes them into one. `--engines` adds OpenVINO GenAI
and vLLM, which `make bench-engines` installs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

OUTPUT = Path(__file__).resolve().parents[1] / "build" / "evaluation"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cells or reads an earlier run; prints and draws. 1 if answers differ."""
    # Before torch is imported: otherwise torch's spinning threads take the cores of the kernels'
    # threads and of the other engines.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from .evaluation import figures, matrix, tables
    from .evaluation.engines import ENGINES
    from .evaluation.evaluate import evaluate
    from .evaluation.measure import GateError
    from .kernels import report

    parser = argparse.ArgumentParser(
        prog="python -m bench.relay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    matrix.add_arguments(parser)
    parser.add_argument("--threads", type=int, help="CPU threads of every system; default: torch's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the model")
    parser.add_argument("--engines", nargs="*", choices=tuple(ENGINES), help="all when none named")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder; %(default)s")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="results.json")
    parser.add_argument("--markdown", action="store_true", help="print tables for a document")
    parser.add_argument("--fill", type=Path, help="write the tables into this document")
    arguments = parser.parse_args(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.source is None and arguments.markdown:
        arguments.source = arguments.output / "results.json"
    if arguments.source is not None:
        results = json.loads(arguments.source.read_text())
    else:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            sys.exit("bench.relay: --device cuda needs a GPU that torch can use, and finds none")
        engines = arguments.engines
        if engines is not None and not engines:
            engines = list(ENGINES)
        try:
            results = evaluate(
                matrix.select(arguments),
                engines=engines or (),
                device=arguments.device,
                report=lambda line: print(line, file=sys.stderr, flush=True),
            )
        except GateError as error:
            print(f"{error}\nno figure is given", file=sys.stderr)
            return 1
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "results.json").write_text(json.dumps(results))
    if arguments.fill is not None:
        place = "policies" if arguments.engines is None else "engines"
        report.fill(arguments.fill, place, tables.markdown(results))
    if arguments.markdown:
        print(tables.markdown(results))
        return 0
    tables.show(results)
    for path in figures.write(results, arguments.output):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
