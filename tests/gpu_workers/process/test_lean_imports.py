"""What a rank imports, in processes that are forked from one with its first imports."""

from __future__ import annotations

import pytest
from forked_bodies import Run, run_bodies

from xditd.gpu_workers.process.lean_imports import CLASS_PACKAGES

START = """
pipelines = ("xfuser.model_executor.pipelines", "diffusers.pipelines.pipeline_utils")
heavy = (*pipelines, "transformers", "peft", "scipy.special")
found["imported"] = [name for name in heavy if name in sys.modules]
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
others = ("peft", "diffusers.models.transformers.transformer_wan", "scipy.stats.distributions")
found["with a class"] = [name for name in others if name in sys.modules]
from xfuser.core.distributed import get_sp_group
from xfuser.model_executor.layers.usp import USP
"""

DIFFUSERS = """
import threading
import diffusers
import diffusers.models.transformers as package
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
names = ["SanaTransformer2DModel", "WanTransformer3DModel", "FluxTransformer2DModel"] * 4
from diffusers.models.controlnets import FluxControlNetModel
found["others"] = [name for name in sys.modules if "sana" in name or "cosmos" in name]
classes = []
threads = [threading.Thread(target=lambda name=name: classes.append(getattr(package, name))) for name in names]
[each.start() for each in threads], [each.join() for each in threads]
found["classes"] = sorted({each.__name__ for each in classes})
found["count"] = len(classes)
found["same"] = package.FluxTransformer2DModel is FluxTransformer2DModel is diffusers.FluxTransformer2DModel
found["pipeline"] = diffusers.DiffusionPipeline.__module__
found["differ"] = []
for name in lean_imports.CLASS_PACKAGES:
    each = sys.modules[name]
    alone = {known: getattr(each, known) for known in each.modules()}
    found[name] = len(alone) > 5 and not hasattr(each, "NoSuchModel")  # which the package's own code would know
    found["differ"] += [known for known, value in alone.items() if vars(each)[known] is not value]
"""

SCIPY = """
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
found["before"] = "scipy.stats.distributions" in sys.modules
scheduler = EulerDiscreteScheduler(use_beta_sigmas=True)
scheduler.set_timesteps(4)
found["beta sigmas"] = len(scheduler.sigmas)
scheduler = LMSDiscreteScheduler()
scheduler.set_timesteps(4)
found["coefficient"] = scheduler.get_lms_coefficient(2, 2, 0) != 0
import scipy.stats
from scipy import integrate
found["classes"] = [hasattr(scipy.stats, "norm"), hasattr(integrate, "quad"), type(scipy.stats).__name__]
"""

WRAPPERS = """
import xfuser
try:
    xfuser.xFuserFluxPipeline
except AttributeError as error:
    found["error"] = str(error)
"""

FORWARD = """
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
model = FluxTransformer2DModel(
    in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
)
given = dict(hidden_states=torch.ones(1, 2, 4), encoder_hidden_states=torch.ones(1, 2, 8),
             pooled_projections=torch.ones(1, 8), timestep=torch.ones(1), img_ids=torch.ones(2, 3),
             txt_ids=torch.ones(2, 3))
with torch.no_grad():
    before = model(**given, return_dict=False)[0]
found["after a forward"] = [name for name in sys.modules if name.split(".")[0] == "peft"]
from peft import LoraConfig, inject_adapter_in_model
inject_adapter_in_model(LoraConfig(target_modules=["to_q"], init_lora_weights=False), model)
layer = model.transformer_blocks[0].attn.to_q
scales = []
layer.register_forward_hook(lambda *_: scales.append(layer.scaling["default"]))
from diffusers.utils import constants
import diffusers.utils
diffusers.utils.USE_PEFT_BACKEND = True  # as where PEFT is not left out
for scale in (1.0, 0.5):
    with torch.no_grad():
        model(**given, joint_attention_kwargs={"scale": scale})
found["scales"] = [each / layer.scaling["default"] for each in scales]
"""

TRANSFORMERS = """
import typing
from xditd.gpu_workers.models import registry
from xditd.gpu_workers.process import preload
from xditd.gpu_workers.process.late_imports import LateImports
imports = LateImports()
imports.finish_for_lend()
heavy = ("transformers.modeling_utils", "transformers.models.clip.modeling_clip", "torch._dynamo.eval_frame")
torchvision = ("torchvision", "diffusers.models.transformers.transformer_cosmos")  # whose import needs the compiler
found["before"] = [name for name in (*heavy, *torchvision) if name in sys.modules]
found["pipelines"] = "diffusers.pipelines.flux.pipeline_flux" in sys.modules
from diffusers.loaders import lora_base
from diffusers.pipelines.flux import pipeline_flux
late, config = pipeline_flux.CLIPTextModel, getattr(pipeline_flux, "CLIPTextModel")
found["annotation"] = str(typing.get_args(late | None)[1])
found["still"] = [name for name in heavy if name in sys.modules]
{first}
import transformers
from transformers.models.clip.modeling_clip import CLIPTextModel
small = transformers.CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                                    vocab_size=16)
encoder = transformers.CLIPTextModel(small)
found["real"] = [transformers.CLIPTextModel is CLIPTextModel, type(encoder) is CLIPTextModel, late.from_pretrained ==
                 CLIPTextModel.from_pretrained, type(late(small)) is CLIPTextModel]
found["is instance"] = [isinstance(encoder, late), isinstance(encoder, lora_base.PreTrainedModel),
                        isinstance(encoder, pipeline_flux.T5EncoderModel), isinstance(None, late)]
found["is subclass"] = [issubclass(CLIPTextModel, late), issubclass(CLIPTextModel, pipeline_flux.T5EncoderModel)]
class Own(late):
    pass
found["bases"] = Own.__mro__[1] is CLIPTextModel
with lazy_transformers.without_transformers():
    from diffusers.pipelines.sana import pipeline_sana
    found["late again"] = type(pipeline_sana.Gemma2PreTrainedModel) is type(late)
found["place"] = [type(sys.modules["transformers"]).__name__, "gemma2" in " ".join(sys.modules)]
"""
FIRSTS = (
    "import transformers",
    "late.from_pretrained",
    "class Other(late): pass",
    "isinstance(torch, late)",
    "preload.import_all(preload.AFTER_LENDS)",
    "assert imports.wait_s == 0.0; imports.run_next()",
)

STEPS = """
from xditd.gpu_workers.process import preload
from xditd.gpu_workers.process.late_imports import FOR_GRAPHS, LateImports
LateImports().finish_for_lend()
for name in (*preload.AFTER_LENDS, *FOR_GRAPHS):
    before = len(sys.modules)
    preload.import_all((name,))
    found[name] = max(found.get(name, 0), len(sys.modules) - before)
"""

MISSING = """
import types
from importlib import metadata
from xditd.gpu_workers.process import lazy_names
own = lean_imports._LAZY_MODULES
names = ("torch.distributed.no_such_module", "torch.distributed.pipelining", "torch.distributed.fsdp.wrap")
lean_imports._LAZY_MODULES = names
with lazy_names.with_placeholders(lean_imports._placeholders()):
    found["placeholders"] = [type(sys.modules[name]).__name__ if name in sys.modules else None for name in names]
    from torch.distributed.fsdp.wrap import enable_wrap
    try:
        enable_wrap("called with placeholders installed")
    except TypeError as error:
        found["called"] = str(error)
found["ours"] = [lean_imports._has_file(name) for name in own]
def version(name):
    raise metadata.PackageNotFoundError(name)
real, metadata.version = metadata.version, version
with lazy_transformers.without_transformers():
    found["no version"] = "transformers" in sys.modules
metadata.version = real
stub = sys.modules["transformers"] = types.ModuleType("transformers")
with lazy_transformers.without_transformers():
    found["no spec"] = sys.modules["transformers"] is stub
"""
BODIES = (
    START,
    DIFFUSERS,
    SCIPY,
    WRAPPERS,
    FORWARD,
    STEPS,
    MISSING,
    *(TRANSFORMERS.format(first=first) for first in FIRSTS),
)


@pytest.fixture(scope="module")
def run() -> Run:
    return run_bodies(BODIES)


def test_a_rank_starts_without_pipelines_transformers_and_peft(run: Run) -> None:
    found = run(START)
    assert found == {"imported": [], "with a class": []}


@pytest.mark.parametrize("first", FIRSTS)
def test_lends_need_no_transformers_until_one_of_its_classes_is_asked_for(run: Run, first: str) -> None:
    found = run(TRANSFORMERS.format(first=first))
    assert found == {
        "before": [],
        "pipelines": True,
        "annotation": "<class 'NoneType'>",
        "still": [],
        "real": [True] * 4,
        "is instance": [True, True, False, False],
        "is subclass": [True, False],
        "bases": True,
        "late again": True,
        "place": ["_LazyModule", False],
    }


def test_no_late_import_brings_most_of_the_modules_while_a_command_may_wait_for_it(run: Run) -> None:
    steps = run(STEPS)
    assert max(steps.values()) < 0.3 * sum(steps.values()), steps


def test_what_is_not_installed_has_no_place(run: Run) -> None:
    found = run(MISSING)
    assert "enable_wrap() takes 0 positional arguments" in found.pop("called")
    assert found == {
        "placeholders": [None, "PlaceholderModule", "PlaceholderModule"],
        "ours": [True] * 3,
        "no version": False,
        "no spec": True,
    }


def test_all_of_diffusers_is_there_when_it_is_asked_for(run: Run) -> None:
    found = run(DIFFUSERS)
    assert found == {
        "classes": ["FluxTransformer2DModel", "SanaTransformer2DModel", "WanTransformer3DModel"],
        "count": 12,
        "same": True,
        "pipeline": "diffusers.pipelines.pipeline_utils",
        "others": [],
        "differ": [],
        **dict.fromkeys(CLASS_PACKAGES, True),
    }


def test_what_schedulers_use_of_scipy_is_there_when_they_use_it(run: Run) -> None:
    pytest.importorskip("scipy", reason="diffusers needs scipy for few schedulers only, and does not install it")
    found = run(SCIPY)
    assert found == {"before": False, "beta sigmas": 5, "coefficient": True, "classes": [True, True, "module"]}


def test_wrappers_of_xfuser_are_refused_by_name(run: Run) -> None:
    found = run(WRAPPERS)
    assert found == {"error": "xfuser.xFuserFluxPipeline: workers import the modules of xfuser one by one"}


def test_a_forward_imports_peft_only_for_layers_of_it_that_are_scaled(run: Run) -> None:
    pytest.importorskip("peft", reason="workers need PEFT for models with its layers alone")
    found = run(FORWARD)
    assert found == {"after a forward": [], "scales": [1.0, 0.5]}
