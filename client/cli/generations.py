"""What ``xditd generate`` and ``xditd cluster submit`` share: the arguments of a generation, and its output files."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xditd.ipc.errors import BadRequest, OutputFailed
from xditd.ipc.facts import ComponentFacts

if TYPE_CHECKING:
    from xditd.client.conditioning import Conditioning
    from xditd.client.results import GenerationResult

_LATENT_ITEM_BYTES: Final = 4
"""Latents are written in the dtype of the conditioning, which rarely has larger elements."""

_PIXEL_BYTES: Final = 3
"""Bytes for each pixel of an uncompressed image."""


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
        """Check the paths of one image and its latents.

        Raises:
            BadRequest: a path is invalid for such a file, or is also an input.
            OutputFailed: a path cannot be written, or the disk has no room.
        """
        from xditd.client.image_files import check_image_target
        from xditd.client.output_files import check_target

        self._width, self._height = parsed.size
        read = (parsed.transformer, parsed.vae, parsed.embeds, *map(os.path.expanduser, parsed.lora or {}))
        self._read = [path for path in read if path is not None]
        self.images: list[Path] = []
        self.latents: Path | None = None
        if parsed.vae is not None:
            self.images = [check_image_target(parsed.out, self._width, self._height)]
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
            shape = facts.transformer.latents.shape(batch, self._height, self._width)
            check_target(self.latents, _LATENT_ITEM_BYTES * math.prod(shape))

    def name_images(self, count: int) -> None:
        """Set and check the paths of several images: ``out-0.png`` and so on.

        Raises:
            BadRequest, OutputFailed: as the constructor.
        """
        from xditd.client.output_files import check_target

        if self.images and count > 1:
            (one,) = self.images
            self.images = [one.with_name(f"{one.stem}-{number}{one.suffix}") for number in range(count)]
            for path in self.images:
                check_target(path, _PIXEL_BYTES * self._width * self._height)
            self._check_apart()

    def _check_apart(self) -> None:
        taken = {os.path.realpath(path) for path in self._read}
        for output in (*self.images, self.latents):
            if output is not None:
                real = os.path.realpath(output)
                if real in taken:
                    raise BadRequest(f"output file {output}: is also read here, or written twice; choose another name")
                taken.add(real)

    def write(self, result: GenerationResult) -> None:
        """Write the images and the latents.

        Raises:
            OutputFailed: one was not written; the message names the file that has its content instead.
        """
        from xditd.client.image_files import encode_image, image_format
        from xditd.client.output_files import write_or_keep
        from xditd.client.tensor_files import encode_tensors

        failures: list[OutputFailed] = []
        contents: list[tuple[Path, str, list[bytes]]] = []
        for number, path in enumerate(self.images):
            image = result.to_pil(number)
            contents.append((path, "image", [encode_image(image, image_format(path, *image.size))]))
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
