"""Video files: frames as H.264 in an .mp4 by PyAV, if it is installed, or as a folder of PNG files without it.

The wheel of PyAV bundles FFmpeg with encoders under the GPL, so that it is an extra, ``xditd[video]``.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xditd.client.image_files import encode_image, image_to_pil
from xditd.client.output_files import check_folder_target, check_target, output_path, spare_folders, write_file
from xditd.ipc.errors import BadRequest, OutputFailed

if TYPE_CHECKING:
    import torch

MAX_FPS: Final = 1_000

_SUFFIX: Final = ".mp4"
_FOLDER: Final = "save it to a path without a suffix, which becomes a folder of PNG files"
_FRAME: Final = re.compile(r"^frame_(\d{5,})\.png$")
_PIXEL_BYTES: Final = 3


def check_video_target(path: str | os.PathLike[str], frames: int, height: int, width: int, fps: int) -> Path:
    """Check, before a video is generated, that it can be written to a path: an ``.mp4``, or a folder without a suffix.

    Returns the path with ``~`` expanded.

    Raises:
        BadRequest: another suffix, a number of frames a second that is none, sides that an .mp4 cannot have, PyAV is
            needed and not installed, or the folder has frames of a longer video.
        OutputFailed: the path cannot be written, or the disk has no room for the uncompressed frames of a folder.
    """
    target = output_path(path)
    if not target.suffix:
        check_folder_target(target, _PIXEL_BYTES * frames * height * width)
        _check_longer(target, frames)
        return target
    _check_settings(target, height, width, fps)
    _import_av(target)
    return check_target(target)


def write_video(path: str | os.PathLike[str], video: torch.Tensor, fps: int, record: str | None = None) -> Path:
    """Write a video (3, frames, height, width) in [-1, 1] to an ``.mp4``, or to a folder if there is no suffix.

    Files are written atomically; returns the path with ``~`` expanded. Frames are converted one by one. ``record`` is
    the JSON text that the file, or each frame, gets.

    Raises:
        BadRequest: as :func:`check_video_target`.
        OutputFailed: the path cannot be written, or the encoder failed.
    """
    target = output_path(path)
    if target.suffix:
        return write_file(target, encode_video(target, video, fps, record))
    _check_longer(target, video.shape[1])
    _write_frames(target, video, record)
    return target


def write_or_keep_frames(path: str | os.PathLike[str], video: torch.Tensor, record: str | None = None) -> Path:
    """Write a video to a folder as :func:`write_video` does; if that fails, write it to another one.

    Raises:
        BadRequest: as :func:`check_video_target`.
        OutputFailed: it was not written. ``kept`` names the folder that has all frames instead, if there is one.
    """
    try:
        return write_video(path, video, 1, record)
    except OutputFailed as error:
        for folder in spare_folders():
            try:
                kept = Path(tempfile.mkdtemp(prefix="xditd-", dir=folder))
            except OSError:
                continue
            try:
                _write_frames(kept, video, record)
            except OutputFailed:
                shutil.rmtree(kept, ignore_errors=True)
                continue
            found = OutputFailed(f"{error.detail}; the video was saved as {kept}")
            found.kept = (str(kept),)
            raise found from error
        raise OutputFailed(f"{error.detail}; no other folder has room either; the video is lost") from error


def _write_frames(folder: Path, video: torch.Tensor, record: str | None) -> None:
    for number, image in enumerate(video.unbind(1)):
        write_file(folder / f"frame_{number:05}.png", encode_image(image_to_pil(image), "PNG", record))


def encode_video(path: str | os.PathLike[str], video: torch.Tensor, fps: int, record: str | None = None) -> bytes:
    """Encode a video (3, frames, height, width) in [-1, 1] for an ``.mp4`` at this path, with a record as its comment.

    Raises:
        BadRequest: as :func:`check_video_target`.
        OutputFailed: the encoder failed.
    """
    target = output_path(path)
    height, width = video.shape[2:]
    _check_settings(target, height, width, fps)
    av = _import_av(target)
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4") as container:
            if record is not None:
                container.metadata["comment"] = record
            stream = container.add_stream("h264", rate=fps)
            stream.height, stream.width = height, width
            stream.pix_fmt = "yuv420p"
            for image in video.unbind(1):
                container.mux(stream.encode(av.VideoFrame.from_image(image_to_pil(image))))
            container.mux(stream.encode())
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise OutputFailed(f"video file {target}: {error}; {_FOLDER}") from error
    return buffer.getvalue()


def check_fps(fps: object) -> None:
    """Raise ``BadRequest`` unless a video may have as many frames a second."""
    if isinstance(fps, bool) or not isinstance(fps, int) or not 1 <= fps <= MAX_FPS:
        raise BadRequest(f"fps: {fps!r:.100} is not a whole number from 1 to {MAX_FPS}")


def _check_settings(target: Path, height: int, width: int, fps: int) -> None:
    if target.suffix.lower() != _SUFFIX:
        raise BadRequest(
            f"video file {target}: {target.suffix} is not written; use {_SUFFIX}, or a path without a suffix for a "
            "folder of PNG files"
        )
    check_fps(fps)
    if height % 2 or width % 2:
        raise BadRequest(f"video file {target}: {width}x{height} pixels are not even; save it to a folder of PNG files")


def _import_av(target: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise BadRequest(
            f"video file {target}: PyAV is not installed; pip install 'xditd[video]', or save to a path without a "
            "suffix, which becomes a folder of PNG files"
        ) from error
    return av


def _check_longer(folder: Path, frames: int) -> None:
    """Refuse a folder with later frames of another video: the two would be taken for one."""
    later = sorted(number for number in _numbers(folder) if number >= frames)
    if later:
        raise BadRequest(
            f"output folder {folder}: has frame_{later[0]:05}.png of a video of more than {frames} frames; empty it, "
            "or name another folder"
        )


def _numbers(folder: Path) -> Iterator[int]:
    try:
        names = os.listdir(folder)
    except OSError:  # it is not there, or cannot be read: writing says so
        return
    for found in map(_FRAME.match, names):
        if found:
            yield int(found[1])
