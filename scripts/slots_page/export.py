"""Writes docs/slots.html, a page where a reader adds and cancels queries and sees slots change.

    python scripts/slots_page/export.py

The page computes no shapes: every state that its buttons can reach, and every move, is recorded
here from `BatchShape`, by trying each event in each state. page.html shows the records.
"""

from __future__ import annotations

import base64
import json
import sys
import zlib
from pathlib import Path

from baton_kernels import BatchShape, Moves

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).with_name("page.html")
PAGE = ROOT / "docs" / "slots.html"
MARK = "/* recorded */"
SLOTS, CAPACITY, PROMPTS = 3, 12, (2, 5)
EVENTS = [
    *(f"add{tokens}" for tokens in PROMPTS),
    *(f"cancel{slot}" for slot in range(SLOTS)),
    "step",
    "trim",
]


def apply(shape: BatchShape, event: str) -> Moves:
    """Applies one event to a shape; ValueError if it is refused."""
    if event.startswith("add"):
        return shape.allocate(int(event.removeprefix("add")))[1]
    if event.startswith("cancel"):
        shape.free(int(event.removeprefix("cancel")))
        return Moves()
    return shape.trim() if event == "trim" else shape.extend(shape.used)


def rows(shape: BatchShape) -> list[list[int] | None]:
    """Start and length of each slot; None for a free one."""
    return [
        [shape.start(slot), shape.length(slot)] if slot in shape.used else None
        for slot in range(SLOTS)
    ]


def record(aligned: bool) -> dict:
    """All states that events reach from an empty batch, and the effect of each event there.

    Returns:
        "states": for each, the width and its rows; "events": for each state and event, the next
        state, the slots that move and by how many columns, or the text of the error.
    """
    empty = BatchShape(SLOTS, CAPACITY, aligned=aligned)
    shapes, numbers = [empty], {repr(empty): 0}
    events = []
    for shape in shapes:  # grows in the loop
        events.append([])
        for event in EVENTS:
            after = shape.copy()
            try:
                moves = apply(after, event)
            except ValueError as error:
                events[-1].append(str(error))
                continue
            number = numbers.setdefault(repr(after), len(shapes))
            if number == len(shapes):
                shapes.append(after)
            events[-1].append([number, list(moves.source_slots), columns_moved(moves)])
    return {"states": [[shape.width, rows(shape)] for shape in shapes], "events": events}


def columns_moved(moves: Moves) -> int:
    """The number of columns by which all rows of the moves go to the right; each stays in its
    slot."""
    assert moves.source_slots == moves.target_slots
    shifts = {
        target - source
        for source, target in zip(moves.source_starts, moves.target_starts, strict=True)
    }
    assert len(shifts) <= 1
    return shifts.pop() if shifts else 0


def recorded() -> dict:
    return {
        "slots": SLOTS,
        "capacity": CAPACITY,
        "prompts": PROMPTS,
        "events": EVENTS,
        "shapes": {"ragged": record(False), "aligned": record(True)},
    }


def packed(data: dict) -> str:
    text = json.dumps(data, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def unpacked(page: str) -> dict:
    """The data that `packed` put into a page."""
    _, begin, rest = page.partition(f'{MARK} "')
    assert begin
    return json.loads(zlib.decompress(base64.b64decode(rest[: rest.index('"')])))


def main() -> None:
    template = TEMPLATE.read_text()
    assert template.count(f'{MARK} ""') == 1
    page = template.replace(f'{MARK} ""', f'{MARK} "{packed(recorded())}"')
    PAGE.write_text(page)
    print(f"{PAGE.relative_to(ROOT)}: {len(page) >> 10} KiB", file=sys.stderr)


if __name__ == "__main__":
    main()
