"""Video files: frames as H.264 in an .mp4 by PyAV, if it is installed, or as a folder of PNG files without it.

The wheel of PyAV bundles FFmpeg with encoders under the GPL, so that it is an extra, ``xditd[video]``.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from xditd.client.image_files import encode_image, image_to_pil
from xditd.client.output_files import write_file
from xditd.ipc.errors import BadRequest, OutputFailed

if TYPE_CHECKING:
    import torch

MAX_FPS = 1_000


def write_video(path: str | os.PathLike[str], video: torch.Tensor, fps: int) -> Path:
    """Write a video (3, frames, height, width) in [-1, 1] to an ``.mp4``, or to a folder if there is no suffix.

    Files are written atomically; returns the path with ``~`` expanded.

    Raises:
        BadRequest: another suffix, a number of frames a second that is none, or PyAV is needed and not installed.
        OutputFailed: the path cannot be written, or the encoder failed.
    """
    target = Path(path).expanduser()
    if not target.suffix:
        for number, image in enumerate(video.unbind(1)):
            write_file(target / f"frame_{number:05}.png", encode_image(image_to_pil(image), "PNG"))
        return target
    if target.suffix.lower() != ".mp4":
        raise BadRequest(
            f"video file {target}: {target.suffix} is not written; use .mp4, or a path without a suffix for a folder "
            "of PNG files"
        )
    if isinstance(fps, bool) or not isinstance(fps, int) or not 1 <= fps <= MAX_FPS:
        raise BadRequest(f"fps: {fps!r} is not a whole number from 1 to {MAX_FPS}")
    height, width = video.shape[2:]
    if height % 2 or width % 2:
        raise BadRequest(f"video file {target}: {width}x{height} pixels are not even; save it to a folder of PNG files")
    return write_file(target, _encoded(target, video, fps))


def _encoded(target: Path, video: torch.Tensor, fps: int) -> bytes:
    try:
        import av
    except ImportError as error:
        raise BadRequest(
            f"video file {target}: PyAV is not installed; pip install 'xditd[video]', or save to a path without a "
            "suffix, which becomes a folder of PNG files"
        ) from error
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4") as container:
            stream = container.add_stream("h264", rate=fps)
            stream.height, stream.width = video.shape[2:]
            stream.pix_fmt = "yuv420p"
            for image in video.unbind(1):
                frame = av.VideoFrame.from_image(image_to_pil(image))  # type: ignore[no-untyped-call]
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise OutputFailed(
            f"video file {target}: {error}; save it to a path without a suffix, which becomes a folder of PNG files"
        ) from error
    return buffer.getvalue()
