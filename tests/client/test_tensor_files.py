"""Small safetensors files, checked against the format's own library."""

import os

import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from xditd.client import tensor_files  # noqa: E402
from xditd.client.conditioning import conditioning_widths, random_conditioning, read_conditioning  # noqa: E402
from xditd.client.tensor_files import read_stored, read_tensors, write_tensors  # noqa: E402
from xditd.ipc.errors import BadCheckpoint, BadRequest, StaleSource, Unsupported  # noqa: E402

TENSORS = {
    "a": torch.randn(2, 3),
    "b": torch.randn(4).to(torch.bfloat16),
    "c": torch.randn(0, 2, dtype=torch.float64),
    "d": torch.tensor(1.5, dtype=torch.float16),
}


def are_equal(found, expected):
    assert list(found) == list(expected)
    return all(torch.equal(found[name], expected[name]) and found[name].dtype is expected[name].dtype for name in found)


def test_the_library_reads_what_is_written(tmp_path):
    write_tensors(tmp_path / "new" / "t.safetensors", TENSORS)
    found = safetensors_torch.load_file(tmp_path / "new" / "t.safetensors")
    assert are_equal({name: found[name] for name in TENSORS}, TENSORS)


def test_what_the_library_writes_is_read(tmp_path):
    safetensors_torch.save_file(TENSORS, tmp_path / "t.safetensors")
    found = read_tensors(tmp_path / "t.safetensors")
    assert are_equal({name: found[name] for name in TENSORS}, TENSORS)
    assert read_stored(tmp_path / "t.safetensors")["a"].shape == (2, 3)


def test_a_file_that_is_overwritten_while_it_is_read_is_no_mixture(tmp_path, monkeypatch):
    """Its mtime is set back, and its size is the same."""
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS)
    read_into = tensor_files.read_into

    def read_and_overwrite(*given):
        read_into(*given)
        old = path.stat()
        write_tensors(path, {name: tensor + 1 for name, tensor in TENSORS.items()})
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))

    monkeypatch.setattr(tensor_files, "read_into", read_and_overwrite)
    with pytest.raises(StaleSource, match="changed while it was being read"):
        read_tensors(path)


def test_a_transposed_tensor_is_written_as_it_looks(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3).T
    write_tensors(tmp_path / "t.safetensors", {"t": tensor})
    assert torch.equal(read_tensors(tmp_path / "t.safetensors")["t"], tensor)


def test_a_dtype_that_is_not_written_is_named(tmp_path):
    with pytest.raises(BadRequest, match="ids: dtype int64 is not written"):
        write_tensors(tmp_path / "t.safetensors", {"ids": torch.zeros(1, dtype=torch.int64)})


def test_a_truncated_file_is_refused(tmp_path):
    write_tensors(tmp_path / "t.safetensors", TENSORS)
    whole = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "t.safetensors").write_bytes(whole[:-3])
    with pytest.raises(BadCheckpoint, match="truncated"):
        read_tensors(tmp_path / "t.safetensors")


def test_conditioning_gets_its_batch_axis(tmp_path):
    write_tensors(
        tmp_path / "e.safetensors", {"prompt_embeds": torch.zeros(5, 8), "pooled_prompt_embeds": torch.zeros(4)}
    )
    embeds, pooled = read_conditioning(tmp_path / "e.safetensors")
    assert embeds.shape == (1, 5, 8)
    assert pooled.shape == (1, 4)


def test_conditioning_that_is_incomplete_is_named(tmp_path):
    write_tensors(tmp_path / "e.safetensors", {"prompt_embeds": torch.zeros(5, 8)})
    with pytest.raises(BadRequest, match="lacks pooled_prompt_embeds; it holds prompt_embeds"):
        read_conditioning(tmp_path / "e.safetensors")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_random_conditioning_fits_the_checkpoint_and_its_seed(tmp_path, prefix):
    path = tmp_path / "t.safetensors"
    write_tensors(
        path, {f"{prefix}txt_in.weight": torch.zeros(4, 24), f"{prefix}vector_in.in_layer.weight": torch.zeros(4, 12)}
    )
    assert conditioning_widths(path) == (24, 12)
    embeds, pooled = random_conditioning(path, 3, 7)
    again, _ = random_conditioning(path, 3, 7)
    assert (tuple(embeds.shape), tuple(pooled.shape)) == ((1, 7, 24), (1, 12))
    assert torch.equal(embeds, again)


def test_widths_that_cannot_be_told_are_named(tmp_path):
    write_tensors(tmp_path / "v.safetensors", {"decoder.conv_in.weight": torch.zeros(4, 4)})
    with pytest.raises(BadRequest, match=r"v\.safetensors: no FLUX\.1 transformer .*0 tensors are txt_in\.weight"):
        conditioning_widths(tmp_path / "v.safetensors")


def test_what_has_no_widths_is_named_where_it_is_known(tmp_path):
    write_tensors(tmp_path / "l.safetensors", {"lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.zeros(1)})
    with pytest.raises(Unsupported, match=r"l\.safetensors: a LoRA in kohya's names is no model: merge it"):
        conditioning_widths(tmp_path / "l.safetensors")
