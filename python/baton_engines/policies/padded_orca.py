"""Padded Orca: as Orca, but the shared forward is a rectangle.

Every row of a forward with a prefill in it computes as many tokens as the longest prompt there: the
decoders compute one token and padding. That is how BATON describes what it improves on; Orca's own
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
