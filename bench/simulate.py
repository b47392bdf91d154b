"""The study of docs/simulation.md, and the validation of its cost model.

`python -m bench.simulate --help`; the code is in bench/studies/simulate.
"""

import sys

from .studies.simulate.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
