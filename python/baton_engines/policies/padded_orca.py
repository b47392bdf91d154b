"""Padded Orca: as Orca, but the shared forward is a rectangle.

In a forward with a prefill every row is padded to the longest prompt there: the decoders compute
one token and padding. That is how BATON describes what it improves on; Orca's own
text packs, see `orca`.
"""

from .orca import Orca


class PaddedOrca(Orca):
    """Newcomers' prompts and the decoders in one forward, all rows padded to the longest.

    Args:
        admission: one of `ADMISSIONS`, or an `Admission`.
    """

    name = "padded_orca"
    pads = True
