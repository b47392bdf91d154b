"""The docstrings of this repository as Markdown, for mkdocstrings.

They use Google's style with three conventions: `::` before an indented formula, and the closing
paragraphs "Undefined: ..." and "Source: ...".
"""

import re

import griffe


class HouseStyle(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    docstring = re.sub(r"::$", ":", docstring, flags=re.MULTILINE)
    return re.sub(r"^(Undefined|Source):", r"**\1:**", docstring, flags=re.MULTILINE)
