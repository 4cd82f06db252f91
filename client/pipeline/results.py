"""``PipelineResult``: what a call of a pipeline gives, and the settings that made it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xditd.client.output_files import output_path
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
        """Return uint8 (pictures, height, width, 3), or (videos, frames, height, width, 3) of videos."""
        import torch

        image = self.generation.image
        if image is None:
            raise BadRequest("to_numpy: the pipeline has no VAE, so there is no image")
        levels = ((image.detach().to("cpu", torch.float32) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
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

        Of several, ``out.png`` becomes ``out-0.png``, ``out-1.png`` and so on. ``fps`` is the model's unless given.
        Files say how they were made, unless ``metadata`` is false; `xditd generate --from` repeats them.
        """
        rate = self.settings.fps if fps is None else fps
        one = output_path(path)
        if not one.name:
            raise BadRequest(f"path: {one} is a folder; name a file in it, such as {one / 'out.png'}")
        found = []
        for number in range(self.count) if index is None else (index,):
            made = replace(self.generation, record=self.record(number) if metadata else None)
            is_one = index is not None or self.count == 1
            target = one if is_one else one.with_name(f"{one.stem}-{number}{one.suffix}")
            found.append(made.save(target, number, fps=rate, metadata=metadata))
        return found

    def __repr__(self) -> str:
        what = "videos" if self.is_video else "images"
        return f"<PipelineResult {self.count} {what} of {self.settings.model}, seed {self.seed}>"
