"""What ``accelerate`` refuses before it needs a daemon."""

from __future__ import annotations

import pytest
from flux_pipelines import flux

from xditd.client import BadRequest, Client, DaemonUnreachable, accelerate


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"keep": "workers"}, "keep: 'workers'; use 'client' or 'daemon'"),
        ({"components": ()}, "components: no name is given"),
        ({"client": "folder"}, "client: a str; give a Client, or the daemon's folder as runtime_dir"),
        ({"components": "transformer"}, r"give a tuple of names, \('transformer',\)"),
        ({"components": ("transformer", "scheduler")}, "scheduler of FluxPipeline is a FlowMatchEuler"),
        ({"components": ("transformr",)}, "FluxPipeline has no attribute 'transformr'; it has transformer, vae"),
        ({"components": 3}, "components: 3; give a tuple of names"),
        ({"components": (3,)}, r"components: \(3,\); give a tuple of names"),
        ({"wait_s": -1}, "wait_s"),
        ({"components": ("text_encoder",)}, "text_encoder of FluxPipeline is None, no model; it has transformer, vae"),
    ],
)
def test_wrong_arguments_are_named(arguments, text, tmp_path) -> None:
    with pytest.raises(BadRequest, match=text):
        accelerate(flux(), runtime_dir=tmp_path, **arguments)


def test_a_client_and_a_folder_are_refused(tmp_path) -> None:
    with pytest.raises(BadRequest, match="the client has a daemon already: give one of the two"):
        accelerate(flux(), client=object.__new__(Client), runtime_dir=tmp_path)


def test_pipeline_without_a_denoiser_is_refused(tmp_path) -> None:
    pipe = flux()
    pipe.transformer = None
    with pytest.raises(BadRequest, match="FluxPipeline has none of transformer"):
        accelerate(pipe, runtime_dir=tmp_path)


def test_no_daemon_changes_nothing(tmp_path) -> None:
    pipe = flux()
    with pytest.raises(DaemonUnreachable):
        accelerate(pipe, runtime_dir=tmp_path, wait_s=0.1)
    assert "forward" not in vars(pipe.transformer)


def test_components_of_one_model_are_refused(tmp_path) -> None:
    with pytest.raises(BadRequest, match="FluxTransformer2DModel is one model, which has none"):
        accelerate(flux().transformer, runtime_dir=tmp_path, components=("vae",))
