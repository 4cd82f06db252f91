"""What each stage and each turn gets: a run of blocks, a patch of the image. Pure arithmetic."""

from __future__ import annotations

from itertools import pairwise

from xditd.ipc.errors import Unsupported


def deal(count: int, parts: int) -> tuple[slice, ...]:
    """Deal ``count`` things to ``parts`` neighbours, the first ones getting one more where it does not divide."""
    each, more = divmod(count, parts)
    ends = [each * part + min(part, more) for part in range(parts + 1)]
    return tuple(slice(start, stop) for start, stop in pairwise(ends))


def deal_patches(image_tokens: int, patches: int) -> tuple[slice, ...]:
    """Deal an image's tokens, which need not divide, to patches.

    Raises:
        Unsupported: fewer tokens than patches.
    """
    if image_tokens < patches:
        raise Unsupported(
            f"{image_tokens} image tokens are too few for {patches} PipeFusion patches: "
            "use a larger image or fewer pipefusion_patches"
        )
    return deal(image_tokens, patches)
