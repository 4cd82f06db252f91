"""Parts of pages that programs write: what lies between two marks."""

from __future__ import annotations

from pathlib import Path


def replaced(text: str, page: Path, begin: str, end: str, content: str) -> str:
    """Return the text of a page with other content between its marks; ``page`` is named where it has none.

    Raises:
        ValueError: the page has no marks, or not in their order.
    """
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"{page}: no {begin} with {end} below it")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"
