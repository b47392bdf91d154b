"""Imports the bench package, which is not installed, without changing the import path for
others."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "bench"


def import_bench(name: str) -> ModuleType:
    """The module `bench.<name>` of this checkout."""
    if "bench" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "bench", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        sys.modules["bench"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["bench"])
    return importlib.import_module(f"bench.{name}")
