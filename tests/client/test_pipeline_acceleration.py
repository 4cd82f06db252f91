"""What ``Pipeline.open`` does with an ``acceleration``."""

from __future__ import annotations

import pytest

from xditd.client import Pipeline
from xditd.ipc.errors import BadRequest


def test_an_acceleration_without_effect_is_refused_before_a_daemon_is_asked(tmp_path):
    path = tmp_path / "wan.safetensors"
    path.touch()
    with pytest.raises(BadRequest, match="acceleration 'eager' would have no effect: wan has no image_encoder"):
        Pipeline.open(transformer=path, acceleration="eager", runtime_dir=tmp_path)
