"""What ``xditd generate`` and ``xditd cluster submit`` share: the arguments of a generation, and its output files."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xditd.client.cli.control_flags import paths_of
from xditd.ipc.errors import BadRequest, OutputFailed
from xditd.ipc.facts import ComponentFacts

if TYPE_CHECKING:
    from xditd.client.conditioning import Conditioning
    from xditd.client.results import GenerationResult

_LATENT_ITEM_BYTES: Final = 4
"""Latents are written in the dtype of the conditioning, which rarely has larger elements."""

DEFAULT_FPS: Final = 16
"""Frames a second of an .mp4: those of Wan 2.1 and of Wan 2.2 A14B."""


def sampling_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags of ``GenerateFlags`` say of the sampling, as arguments of ``Client.generate``."""
    width, height = parsed.size
    return {
        "height": height,
        "width": width,
        "steps": parsed.steps,
        "seed": parsed.seed,
        "guidance_scale": parsed.guidance,
        "step_cache": parsed.step_cache,
        "options": parsed.option,
    }


class Outputs:
    """The output files of a generation: checked before anything is lent, written elsewhere if that fails later."""

    def __init__(self, parsed: argparse.Namespace) -> None:
        """Check the paths of one image or video and its latents.

        Raises:
            BadRequest: a path is invalid for such a file, or is also an input.
            OutputFailed: a path cannot be written, or the disk has no room.
        """
        from xditd.client.output_files import check_target

        self._width, self._height = parsed.size
        self._frames = parsed.frames or 1
        self._fps = parsed.fps or DEFAULT_FPS
        loras = map(os.path.expanduser, parsed.lora or {})
        read = (parsed.transformer, parsed.transformer_2, parsed.vae, parsed.embeds, *loras, *paths_of(parsed))
        self._read = [path for path in read if path is not None]
        self.images: list[Path] = []
        self.latents: Path | None = None
        if parsed.vae is not None:
            self.images = [self._check_target(parsed.out)]
        if parsed.save_latents is not None:
            self.latents = check_target(parsed.save_latents)
        self._check_apart()

    def prepare(self, facts: ComponentFacts, conditioning: Conditioning) -> None:
        """Set and check the paths, now that the number of images and the shape of latents are known.

        Raises:
            BadRequest, OutputFailed: as the constructor; or the transformer does not take this conditioning.
        """
        from xditd.client.jobs.checks import check_conditioning
        from xditd.client.output_files import check_target

        assert facts.transformer is not None  # lent with kind="transformer"
        batch = check_conditioning(conditioning, facts.transformer.conditioning)
        self.name_images(batch)
        if self.latents is not None:
            shape = facts.transformer.latents.shape(batch, self._height, self._width, self._frames)
            check_target(self.latents, _LATENT_ITEM_BYTES * math.prod(shape))

    def name_images(self, count: int) -> None:
        """Set and check the paths of several images or videos: ``out-0.png`` and so on.

        Raises:
            BadRequest, OutputFailed: as the constructor.
        """
        if self.images and count > 1:
            (one,) = self.images
            self.images = [one.with_name(f"{one.stem}-{number}{one.suffix}") for number in range(count)]
            for path in self.images:
                self._check_target(path)
            self._check_apart()

    @property
    def is_video(self) -> bool:
        return self._frames > 1

    def _check_target(self, path: str | os.PathLike[str]) -> Path:
        """Check the path of an image, or of a video, and the room for it.

        Raises:
            BadRequest, OutputFailed: as the constructor.
        """
        if self.is_video:
            from xditd.client.video_files import check_video_target

            return check_video_target(path, self._frames, self._height, self._width, self._fps)
        from xditd.client.image_files import check_image_target

        if Path(path).suffix.lower() == ".mp4":
            raise BadRequest(f"output file {path}: a video has several frames; give --frames COUNT")
        return check_image_target(path, self._width, self._height)

    def _check_apart(self) -> None:
        taken = {os.path.realpath(path) for path in self._read}
        for output in (*self.images, self.latents):
            if output is not None:
                real = os.path.realpath(output)
                if real in taken:
                    raise BadRequest(f"output file {output}: is also read here, or written twice; choose another name")
                taken.add(real)

    def write(self, result: GenerationResult) -> None:
        """Write the images or videos, and the latents.

        Raises:
            OutputFailed: one was not written; the message names the file that has its content instead.
        """
        from xditd.client.output_files import write_or_keep
        from xditd.client.tensor_files import encode_tensors

        failures: list[OutputFailed] = []
        contents: list[tuple[Path, str, list[bytes]]] = []
        for number, path in enumerate(self.images):
            try:
                contents += self._encoded(result, number, path)
            except OutputFailed as error:
                failures.append(error)
        if self.latents is not None:
            contents.append((self.latents, "file of latents", encode_tensors({"latents": result.latents})))
        for path, what, parts in contents:
            try:
                write_or_keep(path, what, *parts)
            except OutputFailed as error:
                failures.append(error)  # write the other files first
        if failures:
            found = OutputFailed("; ".join(error.detail for error in failures))
            found.kept = tuple(path for error in failures for path in error.kept)
            raise found

    def _encoded(self, result: GenerationResult, number: int, path: Path) -> list[tuple[Path, str, list[bytes]]]:
        """Return the content of an image's or a video's file; a folder of frames is written at once.

        Raises:
            OutputFailed: the encoder failed, or the folder was not written.
        """
        from xditd.client.image_files import encode_image, image_format

        if not self.is_video:
            image = result.to_pil(number)
            return [(path, "image", [encode_image(image, image_format(path, *image.size))])]
        assert result.image is not None
        from xditd.client.video_files import encode_video, write_or_keep_frames

        if path.suffix:
            return [(path, "video", [encode_video(path, result.image[number], self._fps)])]
        write_or_keep_frames(path, result.image[number])
        return []
