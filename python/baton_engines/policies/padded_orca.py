"""Padded Orca: as Orca, but the shared forward is a rectangle.

In a forward with a prefill every row is padded to the longest prompt there, so decoders compute one
token and padding. This is how BATON describes the system that it improves on; Orca's own paper
packs tokens, see `orca`.
"""

from .orca import Orca


class PaddedOrca(Orca):
    """Newcomers' prompts and the decoders in one forward, all rows padded to the longest.

    Args:
        admission: one of `ADMISSIONS`, or an `Admission`.
    """

    name = "padded_orca"
    pads = True
