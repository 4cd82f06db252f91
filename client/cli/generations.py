"""What ``xditd generate`` and ``xditd cluster submit`` share: the arguments of a generation, and its output files."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xditd.client.cli.printing import print_error
from xditd.ipc.addresses import expand_home
from xditd.ipc.errors import BadRequest, OutputFailed
from xditd.ipc.facts import ComponentFacts

if TYPE_CHECKING:
    from xditd.client.conditioning import Conditioning
    from xditd.client.results import GenerationResult

_LATENT_ITEM_BYTES: Final = 4
"""Latents are in float32 or in the dtype of the conditioning, which rarely has larger elements."""

DEFAULT_FPS: Final = 16
"""Frames a second of an .mp4: those of Wan 2.1 and of Wan 2.2 A14B."""
DEFAULT_TEXT_TOKENS: Final = 512
DEFAULT_SIZE: Final = (1024, 1024)
"""Of generations from single files; models that are opened as a whole have their own."""

_PART_FLAGS: Final = ("model", "transformer", "transformer_2", "vae", "image_encoder", "tokenizers", "scheduler")
_PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp", ".tiff", ".bmp", ".gif", ".mp4")
"""Files that a model's folder may have beside those that are read, such as an earlier output."""


def size_of(parsed: argparse.Namespace) -> tuple[int, int]:
    """Return width and height."""
    found: tuple[int, int] = parsed.size or DEFAULT_SIZE
    return found


def set_text_tokens(parsed: argparse.Namespace) -> None:
    """Set the text tokens of random embeddings where they are not given, and refuse those of other texts."""
    if parsed.random_embeds is not None:
        parsed.text_tokens = parsed.text_tokens or DEFAULT_TEXT_TOKENS
    elif parsed.text_tokens is not None:
        parsed.refuse("--text-tokens is of --random-embeds; leave it out")


def sampling_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags of ``JobFlags`` say of the sampling, as arguments of ``Client.generate``."""
    width, height = size_of(parsed)
    return {
        "height": height,
        "width": width,
        "steps": parsed.steps,
        "seed": parsed.seed,
        "guidance_scale": parsed.guidance,
        "step_cache": parsed.step_cache or 0.0,
        "options": parsed.option,
    }


def _files_at(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a path and, of a folder, the paths of what is in it and may be read."""
    found = expand_home(os.fspath(path))
    yield found
    with contextlib.suppress(OSError):  # no folder
        yield from (each.path for each in os.scandir(found) if not each.name.lower().endswith(_PICTURES))


class Outputs:
    """The output files of a generation: checked before anything is lent, written elsewhere if that fails later."""

    def __init__(self, parsed: argparse.Namespace, read: Sequence[str | os.PathLike[str] | None] = ()) -> None:
        """Check the paths of one image or video and its latents. ``read`` are further files that are read.

        Raises:
            BadRequest: a path is invalid for such a file, or is also an input.
            OutputFailed: a path cannot be written, or the disk has no room.
        """
        from xditd.client.output_files import check_target

        self._width, self._height = size_of(parsed)
        self._frames = parsed.frames or 1
        self._fps = parsed.fps or DEFAULT_FPS
        self._out: str | None = parsed.out
        self._has_image = parsed.vae is not None or getattr(parsed, "model", None) is not None
        self._has_metadata = not parsed.no_metadata
        loras = map(os.path.expanduser, (*(parsed.lora or {}), *(parsed.lora_2 or {})))
        parts = [getattr(parsed, name, None) for name in _PART_FLAGS]
        encoders = getattr(parsed, "text_encoders", None) or ()
        inputs = (*parts, *encoders, parsed.embeds, *loras, *read)
        self._read = [path for path in inputs if path is not None]
        self.images: list[Path] = []
        self.latents: Path | None = None
        if self._has_image:
            self.images = [self._check_target(self._chosen())]
        if parsed.save_latents is not None:
            self.latents = check_target(parsed.save_latents)
        self._check_apart()

    def resize(self, width: int, height: int, frames: int, fps: int) -> None:
        """Set what the model has chosen, and check the paths again.

        Raises:
            BadRequest, OutputFailed: as the constructor.
        """
        self._width, self._height, self._frames, self._fps = width, height, frames, fps
        if self.images:
            self.images = [self._check_target(self._chosen())]
            self._check_apart()

    def spare(self, paths: Iterable[Sequence[str]]) -> None:
        """Check that no output is a file of a model, such as one in the folder of a part.

        Raises:
            BadRequest: names it.
        """
        self._read += [path for each in paths for path in each]
        self._check_apart()

    def prepare(self, facts: ComponentFacts, conditioning: Conditioning, *, is_one: bool = False) -> None:
        """Set and check the paths, now that the number of images and the shape of latents are known.

        With ``is_one``, only one of the images will be written.

        Raises:
            BadRequest, OutputFailed: as the constructor; or the transformer does not take this conditioning.
        """
        from xditd.client.jobs.checks import check_conditioning

        assert facts.transformer is not None  # lent with kind="transformer"
        batch = check_conditioning(conditioning, facts.transformer.conditioning)
        if not is_one:
            self.name_images(batch)
        self.check_latents(facts, batch)

    def check_latents(self, facts: ComponentFacts, batch: int) -> None:
        """Check that there is room for the latents.

        Raises:
            BadRequest, OutputFailed: as the constructor.
        """
        from xditd.client.output_files import check_target

        if self.latents is not None and facts.transformer is not None:
            shape = facts.transformer.latents.shape(batch, self._height, self._width, self._frames)
            check_target(self.latents, _LATENT_ITEM_BYTES * math.prod(shape))

    def name_images(self, count: int) -> None:
        """Set and check the paths of several images or videos: ``out-0.png``, or in a folder the next numbers.

        Raises:
            BadRequest, OutputFailed: as the constructor.
        """
        if self.images and count > 1:
            from xditd.client.output_files import names_folder, numbered_paths

            (one,) = self.images
            if self._out is not None and names_folder(self._out):
                self.images = numbered_paths(self._out, count, "" if self.is_video else one.suffix)
            else:
                self.images = [one.with_name(f"{one.stem}-{number}{one.suffix}") for number in range(count)]
            for path in self.images:
                self._check_target(path)
            self._check_apart()

    @property
    def is_video(self) -> bool:
        return self._frames > 1

    @property
    def _is_folder(self) -> bool:
        """Whether the path is that of a folder for images. Of a video, it is the folder of its frames."""
        from xditd.client.output_files import names_folder

        return self._out is not None and not self.is_video and names_folder(self._out)

    def _chosen(self) -> Path:
        """Return the path of one image or video, of several before they are numbered."""
        if self._out is None:
            return Path("out.mp4" if self.is_video else "out.png")
        from xditd.client.output_files import numbered_paths, output_path

        return numbered_paths(self._out, 1, ".png")[0] if self._is_folder else output_path(self._out)

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
        if not Path(path).suffix:
            raise BadRequest(f"output file {path}: has no suffix; give a picture, {path}.png, or a folder, {path}/")
        return check_image_target(path, self._width, self._height)

    def _check_apart(self) -> None:
        taken = {os.path.realpath(path) for given in self._read for path in _files_at(given)}
        for output in (*self.images, self.latents):
            if output is not None:
                real = os.path.realpath(output)
                if real in taken:
                    raise BadRequest(f"output file {output}: is also read here, or written twice; choose another name")
                taken.add(real)

    def write(
        self, result: GenerationResult, record: Callable[[int], str | None] | None = None, first: int = 0
    ) -> None:
        """Write the images or videos from number ``first`` on, and the latents.

        ``record`` gives the metadata of each; without it, they are those of the result.

        Raises:
            OutputFailed: one was not written; the message names the file that has its content instead.
        """
        from xditd.client.output_files import drop_empty

        numbered = self._take_numbers()
        try:
            self._write(result, record, first)
        finally:
            drop_empty(numbered)

    def _write(self, result: GenerationResult, record: Callable[[int], str | None] | None, first: int) -> None:
        from xditd.client.output_files import write_or_keep
        from xditd.client.tensor_files import encode_tensors

        failures: list[OutputFailed] = []
        contents: list[tuple[Path, str, list[bytes]]] = []
        for number, path in enumerate(self.images, first):
            try:
                contents += self._encoded(result, number, path, self._text(result, number, record))
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

    def _take_numbers(self) -> list[Path]:
        """Take the numbers in a folder for good: another program may have written there since they were checked.

        Returns the paths, of files or folders that are empty; none if the path is that of a file.
        """
        from xditd.client.output_files import names_folder, take_numbered

        if not self.images or self._out is None or not names_folder(self._out):
            return []
        if self.is_video and len(self.images) == 1:  # the folder itself
            return []
        try:
            self.images = take_numbered(self._out, len(self.images), "" if self.is_video else ".png")
        except OutputFailed:
            return []  # writing says why, and keeps the content elsewhere
        return list(self.images)

    def _text(self, result: GenerationResult, number: int, record: Callable[[int], str | None] | None) -> str | None:
        """Return the metadata of an image; a picture is not lost because they cannot be written."""
        if not self._has_metadata:
            return None
        try:
            return result.record_text(number, self._fps) if record is None else record(number)
        except BadRequest as error:
            print_error(f"xditd: warning: written without {error.detail}")
            return None

    def _encoded(
        self, result: GenerationResult, number: int, path: Path, record: str | None
    ) -> list[tuple[Path, str, list[bytes]]]:
        """Return the content of an image's or a video's file; a folder of frames is written at once.

        Raises:
            OutputFailed: the encoder failed, or the folder was not written.
        """
        from xditd.client.image_files import encode_image, image_format

        if not self.is_video:
            image = result.to_pil(number)
            format_name = image_format(path, *image.size)
            try:
                data = encode_image(image, format_name, record)
            except BadRequest as error:  # too long for a JPEG
                print_error(f"xditd: warning: {path}: written without {error.detail}")
                data = encode_image(image, format_name)
            return [(path, "image", [data])]
        video = result.as_decoded()[number]
        from xditd.client.video_files import encode_video, write_or_keep_frames

        if path.suffix:
            return [(path, "video", [encode_video(path, video, self._fps, record)])]
        write_or_keep_frames(path, video, record)
        return []
