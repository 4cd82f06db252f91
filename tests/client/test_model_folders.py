"""Folders, indexes and single files of a model: which files are lent, as which class, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from xditd.client.lending import describe
from xditd.client.model_folders import find_model
from xditd.ipc.errors import BadCheckpoint, BadRequest, Unsupported, XditdError
from xditd.ipc.limits import MAX_TEXT_CHARS
from xditd.ipc.tensors import ComponentKind, FileBlock, HostShmBlock

CONFIG = {"_class_name": "WanTransformer3DModel", "num_layers": 1}
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
STATE = {"a.weight": torch.arange(6.0), "b.weight": torch.ones(2, 3).bfloat16(), "c.bias": torch.zeros(5)}
SHARDS = {
    "diffusion_pytorch_model-00001-of-00002.safetensors": ["a.weight", "b.weight"],
    "diffusion_pytorch_model-00002-of-00002.safetensors": ["c.bias"],
}


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a configuration."""
    found = tmp_path / "transformer"
    found.mkdir()
    write_json(found / "config.json", CONFIG)
    return found


@pytest.fixture
def sharded(folder: Path) -> Path:
    for name, tensors in SHARDS.items():
        save_file({each: STATE[each] for each in tensors}, folder / name)
    write_json(folder / INDEX, {"weight_map": {each: name for name, tensors in SHARDS.items() for each in tensors}})
    return folder


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def refuse(source: Path | str, error: type[XditdError], says: str, **how: Any) -> XditdError:
    """Describe a source that is refused, and check that nothing stays open."""
    before = open_descriptors()
    with pytest.raises(error, match=says) as caught:
        describe(source, **how)
    assert open_descriptors() == before
    return caught.value


def test_a_folder_with_one_file(folder: Path):
    save_file(STATE, folder / WEIGHTS)
    offer = describe(folder)
    manifest = offer.manifest
    assert manifest.label == "transformer"
    assert manifest.kind is None
    assert manifest.module is not None
    assert manifest.module.class_name == "diffusers:WanTransformer3DModel"
    assert json.loads(manifest.module.config) == CONFIG
    assert (manifest.module.state, manifest.module.allows_family) == (b"", True)
    assert [type(block) for block in manifest.blocks] == [FileBlock]
    assert {spec.name for spec in manifest.tensors} == STATE.keys()
    assert offer.copied.total == 0
    offer.close()


@pytest.mark.parametrize("by", ["folder", "index"])
def test_shards_are_blocks_of_one_component(sharded: Path, by: str):
    offer = describe(sharded if by == "folder" else sharded / INDEX, as_class=True)
    manifest = offer.manifest
    assert manifest.label == "transformer"
    assert manifest.module is not None
    assert not manifest.module.allows_family
    blocks = [block for block in manifest.blocks if isinstance(block, FileBlock)]
    assert [Path(block.path).name for block in blocks] == sorted(SHARDS)
    found = {spec.name: Path(blocks[spec.block].path).name for spec in manifest.tensors}
    assert found == {each: name for name, tensors in SHARDS.items() for each in tensors}
    assert offer.copied.total == 0
    offer.close()


def test_shards_through_the_links_of_a_cache(sharded: Path, tmp_path: Path):
    """As the cache of the Hugging Face Hub has them: links to files elsewhere."""
    cache = tmp_path / "snapshot"
    cache.mkdir()
    for file in sharded.iterdir():
        (cache / file.name).symlink_to(file)
    offer = describe(f"{cache}/")
    assert len(offer.manifest.blocks) == 2
    offer.close()


def test_a_device_gets_all_shards_in_one_arena(sharded: Path):
    before = open_descriptors()
    offer = describe(sharded, device="cpu")
    assert [type(block) for block in offer.manifest.blocks] == [HostShmBlock]
    assert {spec.name: spec.shape for spec in offer.manifest.tensors} == {
        name: tuple(tensor.shape) for name, tensor in STATE.items()
    }
    assert offer.manifest.module is not None
    assert offer.copied.host_to_host == sum(tensor.nbytes for tensor in STATE.values())
    offer.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("by", ["folder", "index"])
def test_a_kind_asks_for_a_family_that_computes_as_the_configuration_says(sharded: Path, by: str):
    """Whether weights are packed, a family sees by their tensors."""
    write_json(sharded / "config.json", {**CONFIG, "quantization_config": {}})
    source = sharded if by == "folder" else sharded / INDEX
    for kind, config in ((ComponentKind.TRANSFORMER, CONFIG), (ComponentKind.MODULE, None)):
        offer = describe(source, kind=kind)
        assert offer.manifest.kind is kind
        module = offer.manifest.module
        assert (None if module is None else json.loads(module.config)) == config
        offer.close()
    refuse(source, BadRequest, "leave one of them out", kind=ComponentKind.TRANSFORMER, as_class=True)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("{", BadCheckpoint, "config.json: it is not JSON"),
        (json.dumps(CONFIG | {"x": "x" * 4 * MAX_TEXT_CHARS}), BadCheckpoint, "bytes; at most"),
        ("{}", Unsupported, "it names no class"),
    ],
    ids=["damaged", "large", "without a class"],
)
def test_a_configuration_that_cannot_be_compared(sharded: Path, text: str, error: type[XditdError], says: str):
    (sharded / "config.json").write_text(text)
    refuse(sharded, error, says, kind=ComponentKind.TRANSFORMER)


def test_a_part_of_a_file_has_no_configuration(folder: Path):
    save_file({f"x.{name}": each for name, each in STATE.items()}, folder / WEIGHTS)
    offer = describe(folder / WEIGHTS, kind=ComponentKind.TRANSFORMER, prefix="x.")
    assert offer.manifest.module is None
    offer.close()


def test_an_index_without_a_configuration_is_for_a_family(sharded: Path):
    (sharded / "config.json").unlink()
    offer = describe(sharded / INDEX)
    assert offer.manifest.module is None
    assert len(offer.manifest.blocks) == 2
    offer.close()
    refuse(sharded / INDEX, BadRequest, "config.json beside it, and there is none", as_class=True)
    refuse(sharded, BadCheckpoint, f"without a config.json .* lend its index: {INDEX}")


class TestSingleFiles:
    """A ``config.json`` beside a file says what it is only if the file has the name that belongs to it."""

    @pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.fp16.safetensors", "model.safetensors"])
    def test_the_name_of_saved_weights(self, folder: Path, name: str):
        save_file(STATE, folder / name)
        found = find_model(str(folder / name))
        assert found.paths == (str(folder / name),)
        assert found.description is not None
        assert found.description.allows_family

    def test_another_name(self, folder: Path):
        save_file(STATE, folder / "flux1-dev.safetensors")
        assert find_model(str(folder / "flux1-dev.safetensors")).description is None

    def test_a_configuration_that_cannot_be_used(self, folder: Path):
        """A family may know the tensors without it."""
        save_file(STATE, folder / WEIGHTS)
        (folder / "config.json").write_text("no JSON")
        assert find_model(str(folder / WEIGHTS)).description is None
        refuse(folder / WEIGHTS, BadCheckpoint, "it is not JSON", as_class=True)
        refuse(folder, BadCheckpoint, "it is not JSON")

    def test_one_of_several_shards(self, sharded: Path):
        refuse(sharded / next(iter(SHARDS)), BadCheckpoint, "file 1 of the 2 .*: lend its index .* or the folder")

    @pytest.mark.parametrize("path", ["", "missing.safetensors", "missing/", "missing.safetensors.index.json"])
    def test_what_does_not_exist(self, path: str):
        refuse(path, BadRequest, "no such file")

    def test_a_path_with_a_null_byte(self):
        refuse("a\0b", BadRequest, "null")


class TestVariants:
    @pytest.fixture
    def files(self, folder: Path) -> Path:
        for name in (WEIGHTS, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.ema.safetensors"):
            save_file(STATE, folder / name)
        return folder

    def test_one_of_them(self, files: Path):
        found = find_model(str(files), variant="fp16")
        assert [Path(path).name for path in found.paths] == ["diffusion_pytorch_model.fp16.safetensors"]

    def test_several_are_named_with_the_remedy(self, files: Path):
        error = refuse(files, BadCheckpoint, r"name one by variant= \(ema, fp16\), or lend the path of one of them")
        assert all(path.name in error.detail for path in files.glob("*.safetensors"))

    @pytest.mark.parametrize("variant", ["bf16", "", "../fp16"])
    def test_one_that_is_not_there(self, files: Path, variant: str):
        if variant:
            refuse(files, BadCheckpoint, "no weights of variant .* its variants are ema, fp16", variant=variant)
        else:
            assert find_model(str(files), variant="").paths == (str(files / WEIGHTS),)

    @pytest.mark.parametrize(
        "name", [f"{WEIGHTS}.index.fp16.json", "diffusion_pytorch_model.fp16.safetensors.index.json"]
    )
    def test_an_index_of_one(self, sharded: Path, name: str):
        """Both places at which diffusers has put the variant."""
        shards = {each: each.replace(".safetensors", ".fp16.safetensors") for each in SHARDS}
        for given, changed in shards.items():
            (sharded / changed).write_bytes((sharded / given).read_bytes())
        write_json(sharded / name, {"weight_map": {each: shards[shard] for shard, of in SHARDS.items() for each in of}})
        found = find_model(str(sharded), variant="fp16")
        assert [Path(path).name for path in found.paths] == sorted(shards.values())
        refuse(sharded, BadCheckpoint, "2 candidates")

    def test_what_is_no_folder_has_none(self, files: Path):
        refuse(files / WEIGHTS, BadRequest, "selects one of the files of a folder", variant="fp16")
        with pytest.raises(BadRequest, match="selects one of the files of a folder"):
            describe(STATE, variant="fp16")


class TestBadIndexes:
    @staticmethod
    def change(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        change(weight_map)
        write_json(folder / INDEX, {"weight_map": weight_map})

    @pytest.mark.parametrize(
        "shard", ["../x.safetensors", "/etc/x.safetensors", "..", ".", "", "a/b.safetensors", "a\0"]
    )
    def test_a_shard_outside_the_folder(self, sharded: Path, shard: str):
        save_file(STATE, sharded.parent / "x.safetensors")
        self.change(sharded, lambda weight_map: weight_map.update({"a.weight": shard}))
        refuse(sharded, BadCheckpoint, f"{INDEX}: it names the shard .*, but shards are files in the index's folder")

    def test_a_shard_that_is_a_pickle(self, sharded: Path):
        self.change(sharded, lambda weight_map: weight_map.update({"a.weight": "pytorch_model.bin"}))
        refuse(sharded, BadCheckpoint, "only safetensors files are lent: convert it")

    def test_a_missing_shard(self, sharded: Path):
        missing = sorted(SHARDS)[1]
        (sharded / missing).unlink()
        error = refuse(sharded, BadCheckpoint, f"1 of its 2 shards are not beside it: {missing}; download them again")
        assert list(error.names) == [missing]

    def test_a_shard_with_a_name_that_is_too_long(self, sharded: Path):
        self.change(sharded, lambda weight_map: weight_map.update({"a.weight": "a" * 5_000 + ".safetensors"}))
        refuse(sharded, BadCheckpoint, "1 of its 3 shards are not beside it")

    def test_a_tensor_that_its_shard_lacks(self, sharded: Path):
        first = sorted(SHARDS)[0]
        self.change(sharded, lambda weight_map: weight_map.update({"d.weight": first}))
        refuse(sharded, BadCheckpoint, f"shards lack 1 tensors that it lists: d.weight of {first}; download")

    def test_a_tensor_that_is_in_another_shard(self, sharded: Path):
        first = sorted(SHARDS)[0]
        self.change(sharded, lambda weight_map: weight_map.update({"c.bias": first}))
        self.change(sharded, lambda weight_map: weight_map.update({"a.weight": sorted(SHARDS)[1]}))
        refuse(sharded, BadCheckpoint, f"shards lack 2 tensors that it lists: a.weight of .*, c.bias of {first}")

    def test_a_tensor_in_two_shards(self, sharded: Path):
        first, second = sorted(SHARDS)
        save_file({name: STATE[name] for name in ("c.bias", "a.weight")}, sharded / second)
        refuse(sharded, BadCheckpoint, f"tensor a.weight is in two shards, {first} and {second}")

    def test_a_tensor_that_the_index_does_not_list_is_lent(self, sharded: Path):
        """As both libraries read it."""
        self.change(sharded, lambda weight_map: weight_map.pop("b.weight"))
        offer = describe(sharded)
        assert {spec.name for spec in offer.manifest.tensors} == STATE.keys()
        offer.close()

    def test_a_truncated_shard(self, sharded: Path):
        path = sharded / sorted(SHARDS)[0]
        path.write_bytes(path.read_bytes()[:-4])
        refuse(sharded, BadCheckpoint, f"{path.name}: .*truncated")

    def test_too_many_shards(self, sharded: Path):
        write_json(sharded / INDEX, {"weight_map": {f"{n}.weight": f"{n}.safetensors" for n in range(5_000)}})
        refuse(sharded, BadCheckpoint, "it names 5000 shards; at most 4096 can be lent")


class TestFoldersThatAreNone:
    def test_a_pipeline_names_its_components(self, tmp_path: Path):
        write_json(tmp_path / "model_index.json", {"_class_name": "FluxPipeline"})
        for name in ("transformer", "vae"):
            (tmp_path / name).mkdir()
            write_json(tmp_path / name / "config.json", CONFIG)
        (tmp_path / "scheduler").mkdir()
        refuse(tmp_path, BadCheckpoint, "a diffusers pipeline: lend the folders .* one at a time: transformer, vae$")

    def test_weights_of_no_known_name(self, folder: Path):
        save_file(STATE, folder / "mine.safetensors")
        refuse(folder, BadCheckpoint, "not known which of its files to lend: lend one of them: mine.safetensors")

    def test_pickles(self, folder: Path):
        (folder / "diffusion_pytorch_model.bin").touch()
        refuse(folder, BadCheckpoint, "it has diffusion_pytorch_model.bin: convert it to safetensors")

    def test_quantised_weights(self, folder: Path):
        save_file(STATE, folder / WEIGHTS)
        write_json(folder / "config.json", {**CONFIG, "quantization_config": {"quant_method": "torchao"}})
        refuse(folder, Unsupported, "the weights are packed")
