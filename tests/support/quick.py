"""`make test-quick`: which tests are left out so that a change is checked in minutes.

It runs one dtype of each test and one instruction set. It leaves out code for GPUs (emulated,
interpreted, compiled), benchmarks, examples, and tests marked ``slow``. `make test` runs them all.
"""

import pytest
import torch

FOLDERS_LEFT_OUT = {"bench", "cuda", "examples", "triton"}
PREFERRED = (torch.bfloat16, torch.float32, torch.float16)


def parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def chosen(items: list[pytest.Item], backend: str) -> list[pytest.Item]:
    """The quick ones, in their order; ``backend`` is the only one on which ops are tested."""
    dtypes: dict[tuple[object, str], set[torch.dtype]] = {}
    for item in items:
        for name, value in parameters(item).items():
            if isinstance(value, torch.dtype):
                dtypes.setdefault((item.function, name), set()).add(value)

    def is_quick(item: pytest.Item) -> bool:
        if item.get_closest_marker("slow") or item.path.parent.name in FOLDERS_LEFT_OUT:
            return False
        for name, value in parameters(item).items():
            if name == "ops" and value.name != backend:
                return False
            if name == "backend" and str(value).startswith("cuda"):
                return False
            if isinstance(value, torch.dtype):
                others = dtypes[item.function, name]
                if value != next((x for x in PREFERRED if x in others), value):
                    return False
        return True

    return [item for item in items if is_quick(item)]
