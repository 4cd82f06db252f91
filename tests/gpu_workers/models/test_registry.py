"""Families of other packages: found by entry points, asked after our own, and left out if they are broken."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xditd.gpu_workers.models import registry
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.ipc.errors import BadCheckpoint, UnknownFamily, Unsupported

PACKAGE = Path(__file__).parents[2] / "family_package"
FLUX = {"double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"}
SCALE = {"scale.weight": TensorInfo("float32", (4,))}

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put folders of packages on this process's path; or write a package of one module there, by name and code."""
    modules = {"scale_family", "scale_operations"}

    def write(name: str = "", code: str = "", *, folder: Path | None = None) -> None:
        if folder is None:
            folder = tmp_path / name
            about = folder / f"{name}-2.0.dist-info"
            about.mkdir(parents=True)
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
            (about / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\n{name} = {name}:Made\n")
            (folder / f"{name}.py").write_text(code)
            modules.add(name)
        monkeypatch.syspath_prepend(folder)
        registry.other_families.cache_clear()

    yield write
    registry.other_families.cache_clear()
    for name in modules:
        sys.modules.pop(name, None)


def test_a_family_of_another_package_is_found_and_asked_after_our_own(install: Install) -> None:
    with pytest.raises(UnknownFamily):
        registry.detect(SCALE)
    install(folder=PACKAGE)
    assert registry.detect(SCALE).name == "scale"
    own = [family.name for family in registry.own_families()]
    assert {"flux1", "t5", "z_image"} <= set(own)
    assert [family.name for family in registry.families()] == [*own, "scale"]
    assert registry.detect({*FLUX, *SCALE}).name == "flux1"
    with pytest.raises(
        UnknownFamily, match=r"lend FLUX\.1 .* or a scale of the tests \(scale\.safetensors\); 1 tensor"
    ):
        registry.detect({"x"})


def test_our_own_families_need_no_other_package(install: Install) -> None:
    install("bad", "raise SystemError('imported')")
    registry.detect(FLUX)
    assert "bad" not in sys.modules


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            "import nothing_of_the_kind",
            r"bad of bad 2\.0 \(ModuleNotFoundError: No module named 'nothing_of_the_kind'\)",
        ),
        ("raise SystemExit('broken')", r"bad of bad 2\.0 \(SystemExit: broken\)"),
        ("class Other: pass", r"bad of bad 2\.0 \(AttributeError: .*Made"),
        (
            "from scale_family import ScaleFamily\nMade = type('Made', (), {name: member for name, member in "
            "vars(ScaleFamily).items() if name not in ('heads', '__dict__', '__weakref__')})",
            r"bad of bad 2\.0 \(TypeError: bad:Made lacks heads: give it all members of the Family protocol\)",
        ),
        (
            "from scale_family import ScaleFamily\nclass Made(ScaleFamily):\n    name, kind = 'mine', 'unet'",
            r"bad of bad 2\.0 \(ValueError: mine is of kind 'unet': use one of transformer, vae, text_encoder, co",
        ),
        (
            "from scale_family import ScaleFamily\nclass Made(ScaleFamily):\n    name = 't5'",
            r"bad of bad 2\.0 \(ValueError: a family named t5 exists already: give this one another name\)",
        ),
    ],
    ids=["import", "raises", "no class", "no member", "no kind", "a name of ours"],
)
def test_a_broken_family_is_logged_and_named_and_breaks_no_other(
    install: Install, caplog: pytest.LogCaptureFixture, cache: ModelCache, code: str, says: str
) -> None:
    caplog.set_level(logging.ERROR)
    install(folder=PACKAGE)
    install("bad", code)
    assert registry.detect(SCALE).name == "scale"
    assert registry.detect(FLUX).name == "flux1"
    assert [record.message for record in caplog.records] == [
        "family of another package cannot be used: entry_point=bad value=bad:Made package=bad 2.0"
    ]
    for names, error in (({"x.weight"}, UnknownFamily), ({"distilled_guidance_layer.x"}, Unsupported)):
        with pytest.raises(error, match=f"; not asked, since they could not be loaded: {says}"):
            cache.match({name: TensorInfo("float32", (2, 2)) for name in names})


def test_of_two_packages_with_one_name_the_first_stays(install: Install) -> None:
    install(folder=PACKAGE)
    install("zeal", "from scale_family import ScaleFamily\nclass Made(ScaleFamily): pass")
    assert type(registry.detect(SCALE)).__module__ == "scale_family"
    assert [fault.partition(" (")[0] for fault in registry.other_families().faults] == ["zeal of zeal 2.0"]


def test_what_a_family_claims_and_does_not_fit_is_its_own_to_explain(install: Install, cache: ModelCache) -> None:
    """Although the table of what people hold knows one of the names."""
    install(folder=PACKAGE)
    both = {**SCALE, "distilled_guidance_layer.x": TensorInfo("float32", (1, 2, 9))}
    with pytest.raises(BadCheckpoint, match=r"does not fit scale: .*1 unexpected: distilled_guidance_layer\.x"):
        cache.match(both)
    vae = {"decoder.conv_in.weight": TensorInfo("float32", (512, 4, 3, 3))}
    vae |= {f"decoder.up.{level}.block.0.conv1.weight": TensorInfo("float32", (512, 512, 3, 3)) for level in range(4)}
    vae |= {f"decoder.mid.block_{n}.conv1.weight": TensorInfo("float32", (512, 512, 3, 3)) for n in (1, 2)}
    with pytest.raises(Unsupported, match=r"^flux_vae: 4 latent channels, not 16: .*Stable Diffusion 1, 2 and XL"):
        cache.match(vae)
    with pytest.raises(Unsupported, match=r"^Chroma cannot be run: lend FLUX"):
        cache.match(
            {name: TensorInfo("float32", (2, 2)) for name in {*FLUX, "distilled_guidance_layer.in_proj.weight"}}
        )


def test_what_a_family_does_is_imported_when_it_is_lent(install: Install, cache: ModelCache) -> None:
    install(folder=PACKAGE)
    registry.detect(SCALE)
    assert "scale_operations" not in sys.modules
    cache.match(SCALE)
    assert "scale_operations" in sys.modules


@pytest.mark.parametrize("family", registry.own_families(), ids=lambda family: family.name)
@pytest.mark.usefixtures("layout")
def test_our_own_families_do_what_their_kind_does(family: Any) -> None:
    assert registry.operations_of(family) is not None


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ("kind = 'vae'", r"lacks decode, encode, shares, shares_encode; .* VaeOperations protocol"),
        ("kind = 'text_encoder'", r"lacks encode, vocabulary; .* TextEncoderOperations protocol"),
        (
            "operations = object()",
            r"object lacks build, check, facts, fuse, recipe and .*; .* TransformerOperations protocol",
        ),
        (
            "class Other(ScaleOperations):\n        recipe = object()\n    operations = Other()",
            r"lacks recipe\.check, recipe\.noise_dtype, recipe\.start; .* TransformerOperations protocol",
        ),
    ],
    ids=["vae", "text encoder", "nothing", "no recipe"],
)
def test_what_a_family_cannot_do_is_named_when_it_is_lent(
    install: Install, cache: ModelCache, members: str, says: str
) -> None:
    install(folder=PACKAGE)
    imports = "from scale_family import ScaleFamily\nfrom scale_operations import ScaleOperations"
    # Its name comes first, so it is asked first.
    install("less", f"{imports}\nclass Made(ScaleFamily):\n    name = 'less'\n    {members}")
    with pytest.raises(Unsupported, match=rf"^less cannot be run: .*{says}"):
        cache.match(SCALE)
