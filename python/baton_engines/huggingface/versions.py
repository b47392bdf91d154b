"""The releases of transformers that this package supports; importing it rejects all others."""

from __future__ import annotations

import transformers

# As in pyproject.toml: from the first on, and before the second.
OLDEST, NEXT = (5, 17), (6, 0)


def check_version(version: str) -> None:
    """Refuse a transformers whose interfaces this package does not know.

    Args:
        version: of transformers.

    Raises:
        ImportError: it is too old or too new.
    """
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST <= numbers < NEXT:
        oldest, following = (".".join(map(str, bound)) for bound in (OLDEST, NEXT))
        raise ImportError(
            f"baton_engines.huggingface: transformers must be >= {oldest} and < {following}, got "
            f"{version}: `pip install 'baton_kernels[engines]'` installs one"
        )


check_version(transformers.__version__)
