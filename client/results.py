"""Results of jobs: ``GenerationResult`` and ``TextEncoding``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from xditd.client.image_files import image_to_pil
from xditd.client.tensor_text import tensor_text
from xditd.ipc.errors import BadRequest

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from xditd.client.metadata.record import Record


@dataclass(frozen=True, eq=False, repr=False)
class GenerationResult:
    """The latents of a generation, and the image if a VAE was given; the caller owns both.

    ``latents`` have the shape in the transformer's facts, and the device and dtype of ``noise`` or, without it, of
    the first conditioning. ``image`` (batch, channels, height, width) is float32 in [-1, 1], on the same device;
    that of videos has frames before the height.
    ``timings_ms`` is the slowest worker's time by phase; ``round_trip`` is the client's. ``seed`` is the seed that
    was used, ``None`` if ``noise`` was given. ``reused_steps`` counts the steps that the step cache skipped, over all
    images of the batch.
    """

    latents: torch.Tensor
    image: torch.Tensor | None
    timings_ms: dict[str, float]
    seed: int | None
    reused_steps: int = 0
    record: Record | None = field(default=None, kw_only=True)
    """How it was made, as its files say it; ``index`` and ``num_images`` of it are set for each file."""
    image_dtype: torch.dtype | None = field(default=None, kw_only=True)
    """That of the VAE. Pictures and frames of 8 bits are made from the image in this dtype, as diffusers makes them."""

    @property
    def is_video(self) -> bool:
        """Whether there are several frames."""
        return self.image is not None and self.image.ndim == 5 and self.image.shape[2] > 1

    def to_pil(self, index: int = 0) -> Image.Image:
        """Convert one image of the batch to 8-bit RGB.

        Raises:
            BadRequest: the job had no VAE, so there is no image; ``index`` is out of range; or it is a video of
                several frames.
        """
        image = self._of(index)
        if image.ndim == 4 and image.shape[1] == 1:
            return image_to_pil(image[:, 0])
        if image.ndim == 4:
            raise BadRequest(f"image: it is a video of {image.shape[1]} frames; take its frames by to_frames()")
        return image_to_pil(image)

    def to_frames(self, index: int = 0) -> list[Image.Image]:
        """Convert the frames of one video of the batch to 8-bit RGB; of an image, it is the only one.

        Raises:
            BadRequest: the job had no VAE, so there are no frames; or ``index`` is out of range.
        """
        video = self._of(index)
        return [image_to_pil(each) for each in (video.unbind(1) if video.ndim == 4 else (video,))]

    def as_decoded(self) -> torch.Tensor:
        """Return ``image`` in the dtype of the VAE, of which pictures are made.

        Raises:
            BadRequest: the job had no VAE.
        """
        if self.image is None:
            raise BadRequest("image: the job had no VAE; give vae= to generate or Pipeline.open, or decode the latents")
        return self.image if self.image_dtype is None else self.image.to(self.image_dtype)

    def _of(self, index: int) -> torch.Tensor:
        decoded = self.as_decoded()
        self.check_index(index)
        return decoded[index]

    def check_index(self, index: int) -> None:
        """Check the number of an image or video of the batch, from 0, or from the last one at -1.

        Raises:
            BadRequest: no whole number, or out of range.
        """
        count = len(self.latents) if self.image is None else len(self.image)
        if isinstance(index, bool) or not isinstance(index, int):
            raise BadRequest(f"index: {index!r:.100} is not a whole number; the batch has {count}, numbered from 0")
        if not -count <= index < count:
            raise BadRequest(f"index {index}: the batch has {count} images, numbered from 0")

    def record_text(self, index: int = 0, fps: int | None = None) -> str | None:
        """Return the JSON text with which one image or video of the batch says how it was made; ``None`` without any.

        Raises:
            BadRequest: a value that no record may have.
        """
        if self.record is None:
            return None
        from msgspec.structs import replace

        from xditd.client.metadata.record import encode

        count = len(self.latents) if self.image is None else len(self.image)
        return encode(replace(self.record, index=index % count, num_images=count, fps=fps if self.is_video else None))

    def save(self, path: str | os.PathLike[str], index: int = 0, *, fps: int = 16, metadata: bool = True) -> Path:
        """Write one image of the batch to a file atomically, in the format of its suffix.

        Creates the folder, and returns the path with ``~`` expanded. A video is written to a file that ends in
        ``.mp4``, by PyAV (``pip install xditd[video]``), with ``fps`` frames a second; or to a path without a suffix,
        which becomes a folder with ``frame_00000.png`` and so on, and needs no package. A video of one frame may also
        be written as an image.

        PNG, JPEG, WebP and MP4 files say how they were made (docs/cli.md has the record), unless
        ``metadata`` is false; other formats do not.

        Raises:
            BadRequest: as :meth:`to_pil`; the path is empty, a folder or no path at all; the suffix names no format
                that can hold it; ``fps`` of a video is not a whole number from 1 to 1000; or PyAV is not installed.
            OutputFailed: the path cannot be written, or the disk has no room; save the image elsewhere.
        """
        from xditd.client.output_files import output_path, write_file

        self._of(index)
        target = output_path(path)
        if self.is_video:
            from xditd.client.video_files import check_fps

            check_fps(fps)
        record = self.record_text(index, fps) if metadata else None
        if self.is_video or (self._of(index).ndim == 4 and target.suffix.lower() in ("", ".mp4")):
            from xditd.client.video_files import write_video

            return write_video(target, self._of(index), fps, record)
        from xditd.client.image_files import encode_image, image_format

        image = self.to_pil(index)
        return write_file(target, encode_image(image, image_format(target, *image.size), record))

    def __repr__(self) -> str:
        image = "no image" if self.image is None else f"image {tensor_text(self.image)}"
        return f"<GenerationResult {image}, latents {tensor_text(self.latents)}, seed {self.seed}>"


@dataclass(frozen=True, eq=False, repr=False)
class TextEncoding:
    """The output of a text encoder in float32, on the device of the token ids; the caller owns it.

    ``hidden_states`` (batch, tokens, width) are the last layer after the final norm. ``pooled`` (batch, width), if
    requested, is the state at the first end-of-text token, before any projection.
    """

    hidden_states: torch.Tensor
    pooled: torch.Tensor | None

    def __repr__(self) -> str:
        pooled = "not pooled" if self.pooled is None else f"pooled {tensor_text(self.pooled)}"
        return f"<TextEncoding hidden_states {tensor_text(self.hidden_states)}, {pooled}>"
