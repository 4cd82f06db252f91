"""``PipelineResult``: what a call of a pipeline gives, and the settings that made it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xditd.client.output_files import drop_empty, names_folder, output_path, take_numbered
from xditd.client.pipeline.settings import RunSettings
from xditd.client.results import GenerationResult
from xditd.ipc.errors import BadRequest

if TYPE_CHECKING:
    import numpy
    from PIL import Image

    from xditd.client.metadata.record import Record


@dataclass(frozen=True, eq=False, repr=False)
class PipelineResult:
    """Pictures or videos of a call. ``generation`` has their tensors, which the caller owns, and the latents.

    With several prompts, ``num_images`` of each follow one another.
    """

    generation: GenerationResult
    settings: RunSettings

    @property
    def seed(self) -> int:
        """The seed of the call, which makes the same pictures again with the same arguments."""
        return self.settings.seed

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that were used: one, from which the noise of all pictures is drawn, as diffusers draws it."""
        return (self.settings.seed,)

    @property
    def count(self) -> int:
        """How many pictures or videos there are."""
        return int(self.generation.latents.shape[0])

    @property
    def is_video(self) -> bool:
        return self.generation.is_video

    @property
    def images(self) -> list[Image.Image]:
        """The pictures; of videos, the frames of the first one."""
        if self.is_video:
            return self.generation.to_frames(0)
        if self.generation.image is not None and self.generation.image.ndim == 5:
            return [self.generation.to_frames(number)[0] for number in range(self.count)]
        return [self.generation.to_pil(number) for number in range(self.count)]

    @property
    def videos(self) -> list[list[Image.Image]]:
        """The frames of each video; of pictures, one frame each."""
        return [self.generation.to_frames(number) for number in range(self.count)]

    def to_numpy(self) -> numpy.ndarray[Any, Any]:
        """Return uint8 (pictures, height, width, 3), or (videos, frames, height, width, 3) of videos.

        Raises:
            BadRequest: the pipeline has no VAE.
        """
        from xditd.client.image_files import levels_of

        if self.generation.image is None:
            raise BadRequest("to_numpy: the pipeline has no VAE, so there is no image")
        levels = levels_of(self.generation.as_decoded())
        if levels.ndim == 5 and not self.is_video:
            levels = levels[:, :, 0]
        found: numpy.ndarray[Any, Any] = levels.movedim(1, -1).contiguous().numpy()
        return found

    def record(self, index: int = 0) -> Record:
        """Return how a picture or video was made, as its file says it; reads the model's files for their hashes."""
        self.generation.check_index(index)
        from xditd.client.metadata.of_runs import record_of_run

        return record_of_run(self.settings, index % self.count, self.count)

    def save(
        self,
        path: str | os.PathLike[str],
        index: int | None = None,
        *,
        fps: int | None = None,
        metadata: bool = True,
    ) -> list[Path]:
        """Write all pictures or videos, or that of ``index``, as ``GenerationResult.save`` does; return the paths.

        Of several, ``out.png`` becomes ``out-0.png``, ``out-1.png`` and so on. In a folder, ``pictures/``, pictures are
        ``00000.png`` and so on, from the next number on; so are several videos, each a folder of PNG files, and one
        video is the folder itself. ``fps`` is the model's unless given.
        Files say how they were made, unless ``metadata`` is false; `xditd generate --from` repeats them.

        Raises:
            BadRequest, OutputFailed: as ``GenerationResult.save``; or ``fps`` of pictures.
        """
        if fps is not None and not self.is_video:
            raise BadRequest(f"fps: {fps!r:.100} is of a video, and these are pictures; leave it out")
        rate = self.settings.fps if fps is None else fps
        numbers = range(self.count) if index is None else (index,)
        records = [self.record(number) if metadata else None for number in numbers]
        targets = self._targets(path, len(numbers))
        found = []
        try:
            for number, record, target in zip(numbers, records, targets, strict=True):
                made = replace(self.generation, record=record)
                found.append(made.save(target, number, fps=rate, metadata=metadata))
        except BaseException:
            if self._is_numbered(path, len(numbers)):
                drop_empty(targets)
            raise
        return found

    def _is_numbered(self, path: str | os.PathLike[str], count: int) -> bool:
        return names_folder(path) and not (self.is_video and count == 1)

    def _targets(self, path: str | os.PathLike[str], count: int) -> list[Path]:
        one = output_path(path)
        if self._is_numbered(path, count):
            return take_numbered(path, count, "" if self.is_video else ".png")
        if not self.is_video and not one.suffix:
            raise BadRequest(f"path: {one} has no suffix; give a picture, {one}.png, or a folder, {one}/")
        return [one] if count == 1 else [one.with_name(f"{one.stem}-{number}{one.suffix}") for number in range(count)]

    def __repr__(self) -> str:
        what = "videos" if self.is_video else "images"
        return f"<PipelineResult {self.count} {what} of {self.settings.model}, seed {self.seed}>"
