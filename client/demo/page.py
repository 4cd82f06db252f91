"""``demo.html``: the demo's pictures with their sentences beneath, as a browser shows them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from xditd.client.demo.report import Picture
from xditd.client.demo.shapes_model import shown
from xditd.client.output_files import write_file

_PAGE: Final = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>xditd demo</title>
<style>
body {{ font: 16px system-ui, sans-serif; margin: 2em; display: flex; flex-wrap: wrap; gap: 2em; }}
figure {{ margin: 0; width: 256px; }}
img {{ width: 256px; height: auto; border: 1px solid #ccc; }}
small {{ color: #666; }}
</style>
{figures}
</html>
"""


def write_page(path: Path, pictures: Sequence[Picture]) -> None:
    """Write a page that shows the pictures, whose files lie in the same folder.

    Raises:
        OutputFailed: the file cannot be written.
    """
    write_file(path, _PAGE.format(figures="\n".join(map(_figure, pictures))).encode())


def _figure(picture: Picture) -> str:
    name, sentence = escape(Path(picture.image).name), escape(picture.sentence)
    read = f"<br><small>read: {escape(shown(picture.read))}</small>" if picture.read else ""
    return f'<figure><img src="{name}" alt="{sentence}"><figcaption>{sentence}{read}</figcaption></figure>'
