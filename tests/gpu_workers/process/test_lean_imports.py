"""What a rank imports, in processes that are forked from one with its first imports."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

PROGRAM = """
import json, os, signal, sys, warnings
import torch
from xditd.gpu_workers.process import late_transformers, lean_imports, xfuser_cpu
lean_imports.leave_out_peft()
with xfuser_cpu.importable():
    lean_imports.import_xfuser()
"""
IN_A_CHILD = """
if not (child := os.fork()):
    found = {{}}
{body}
    print(json.dumps([{number}, found]), file=sys.__stdout__, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
Run = Callable[[str], Any]

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
classes = []
threads = [threading.Thread(target=lambda name=name: classes.append(getattr(package, name))) for name in names]
[each.start() for each in threads], [each.join() for each in threads]
found["classes"] = sorted({each.__name__ for each in classes})
found["count"] = len(classes)
found["same"] = package.FluxTransformer2DModel is FluxTransformer2DModel is diffusers.FluxTransformer2DModel
found["pipeline"] = diffusers.DiffusionPipeline.__module__
found["unknown"] = hasattr(package, "NoSuchModel")
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

COMPILER = """
parts = ("sympy", "torch._dynamo.eval_frame", "torch.distributed.fsdp", "torch.distributed.tensor")
found["before"] = [name for name in parts if name in sys.modules]
from torch._dynamo import allow_in_graph
@torch.compiler.disable(recursive=False)
@torch.compiler.disable
@torch.compiler.assume_constant_result
@allow_in_graph
def double(x):
    return 2 * x
found["marked"] = double(4)
found["after marks"] = [name for name in parts if name in sys.modules]
{use}
import torch._dynamo.eval_frame, torch._dynamo.utils
package = torch._dynamo
found["package"] = [type(package).__name__, package is sys.modules["torch._dynamo"], package.disable.__module__]
found["compiled"] = torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(1)).item()
from xfuser.model_executor.layers import usp
from torch.distributed.tensor.experimental import _attention
wrong = {{}}
for name, function in (("late", usp._templated_ring_attention), ("own", _attention._templated_ring_attention)):
    try:
        function("group")
    except TypeError as error:
        wrong[name] = str(error)
found["ring"] = wrong["late"] == wrong["own"]
"""
USES = (
    "torch.compile(lambda x: x, backend='eager')(torch.ones(1))",
    "import torch._dynamo.utils",
    "from torch._dynamo import config",
    "import torch._inductor.compile_fx",
    "from torch.nn.attention.flex_attention import flex_attention",
    "torch._dynamo.reset()",
    "from xditd.gpu_workers.process import preload; preload.import_all(preload.AFTER_LENDS)",
)

TRANSFORMERS = """
import typing
from xditd.gpu_workers.models import registry
from xditd.gpu_workers.process import preload
from xditd.gpu_workers.process.lend_imports import LendImports
imports = LendImports()
imports.finish_for_lend()
heavy = ("transformers.modeling_utils", "transformers.models.clip.modeling_clip", "torch._dynamo.eval_frame")
found["before"] = [name for name in heavy if name in sys.modules]
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
with late_transformers.without_transformers():
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

TWO_THREADS = """
import importlib, threading
from xditd.gpu_workers.models import block_compiler
from xditd.gpu_workers.process import deferred_packages, late_compiler
is_inside, has_come, faults, main = threading.Event(), threading.Event(), [], threading.get_ident()
def prepare():
    try:
        block_compiler.prepare()
    except Exception as error:
        faults.append(repr(error))
class Meanwhile:
    def find_spec(name, path=None, target=None):
        if name.startswith("torch._dynamo.") and threading.get_ident() != main:
            is_inside.set()
            has_come.wait()  # the main thread asks for the compiler while this one imports it
class Turn:
    def acquire(self):
        if threading.get_ident() == main:
            has_come.set()
        turn.acquire()
    def release(self):
        turn.release()
def note(self):
    if threading.get_ident() == main:
        has_come.set()
    run(self)
run, late_compiler._Compiler.run = late_compiler._Compiler.run, note
turn, deferred_packages._TURN = deferred_packages._TURN, Turn()
sys.meta_path.insert(0, Meanwhile)
thread = threading.Thread(target=prepare, daemon=True)
signal.alarm(60)
thread.start()
is_inside.wait()
importlib.import_module("{module}")
thread.join()
signal.alarm(0)
found["faults"], found["imported"] = faults, "torch._inductor.compile_fx" in sys.modules
"""
OF_COMPILER = ("torch._dynamo.symbolic_convert", "torch._functorch._aot_autograd.runtime_wrappers")

MARKS = """
import functools
from diffusers.utils.torch_utils import maybe_allow_in_graph
def trace(x):
    return x + (1 if torch.compiler.is_compiling() else 10)
def left(number=0, **options):
    return torch.compiler.disable(lambda x: trace(x) + 0 * number, **options)
class Own:
    @torch.compiler.disable()
    def method(self, x):
        return trace(x)
@torch.compiler.disable
class Module(torch.nn.Module):
    def forward(self, x):
        return trace(x)
@maybe_allow_in_graph
def whole(x):
    return 2 * x
constant = torch.compiler.assume_constant_result(lambda: 4)
module, uses = Module(), dict(function=left(), parts=left(recursive=False), method=Own().method, why=left(reason="why"))
uses |= dict(object=torch._dynamo.disable(functools.partial(trace)), torch=torch._disable_dynamo(lambda x: trace(x)))
found["eager"] = [int(use(torch.zeros(1))) for use in uses.values()]
many = [left(number) for number in range(20)]
found["before"] = "torch._dynamo.eval_frame" in sys.modules
graphs, ones = [], torch.zeros(1)
def keep(graph, _):
    graphs.append([node.target for node in graph.graph.nodes])
    return graph
def compiled(use, **options):
    torch._dynamo.reset()
    return torch.compile(lambda x: use(x), backend=keep, **options)(torch.zeros(1))
found["compiled"] = {name: int(compiled(use)) for name, use in (uses | dict(module=module)).items()}
found["marked"] = [constant._dynamo_marked_constant, int(compiled(trace))]
graphs.clear()
compiled(whole)
compiled(maybe_allow_in_graph(trace))  # marked by the function that was imported before
found["whole"] = [whole in graphs[0], trace in graphs[1]]
try:
    compiled(uses["why"], fullgraph=True)
except torch._dynamo.exc.Unsupported as error:
    found["why"] = "(reason: why)" in str(error)
found["many"] = int(compiled(lambda x: functools.reduce(lambda value, use: use(value), many, x)))
"""
FIRST_MODULE = """
import torch._dynamo.config as config
from torch._dynamo import convert_frame
found["same"] = [convert_frame.config is config, torch._dynamo.config is config]
"""
FAILING_PART = """
from xditd.gpu_workers.process import late_compiler
for name in ("torch._dynamo", late_compiler._OF_FLEX_ATTENTION):
    del sys.modules[name]
class Broken:
    def find_spec(name, path=None, target=None):
        if name == late_compiler._OF_FLEX_ATTENTION:
            raise RuntimeError("no symbol")
sys.meta_path.insert(0, Broken)
lean_imports.leave_out_peft()
sys.meta_path.remove(Broken)
found["later"] = torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(1)).item()
"""

BROKEN = """
import importlib
class Broken:
    def find_spec(name, path=None, target=None):
        if name == "torch._dynamo.symbolic_convert":
            raise {error}
sys.meta_path.insert(0, Broken)
said = []
for use in (lambda: torch._dynamo.OptimizedModule, lambda: importlib.import_module("torch._dynamo.utils")) * 2:
    try:
        use()
    except Exception as error:
        said.append(str(error))
found["said"] = said
from torch._dynamo import allow_in_graph, disable
found["marked"] = [allow_in_graph(fn=len) is len, disable(fn=len)([]) == 0, disable()(len)([]) == 0]
from torch.distributed import destroy_process_group, init_process_group
init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
destroy_process_group()
sys.meta_path.remove(Broken)
found["later"] = torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(1)).item()
"""
MISSING = """
import types
from importlib import metadata
from xditd.gpu_workers.process import late_names
own = lean_imports._LATE_MODULES
names = ("torch.distributed.no_such_module", "torch.distributed.pipelining", "torch.distributed.fsdp.wrap")
lean_imports._LATE_MODULES = names
with late_names.in_place(lean_imports._late_modules()):
    found["late"] = [type(sys.modules[name]).__name__ if name in sys.modules else None for name in names]
    from torch.distributed.fsdp.wrap import enable_wrap
    try:
        enable_wrap("called while modules stand in")
    except TypeError as error:
        found["called"] = str(error)
found["ours"] = [lean_imports._has_file(name) for name in own]
def version(name):
    raise metadata.PackageNotFoundError(name)
real, metadata.version = metadata.version, version
with late_transformers.without_transformers():
    found["no version"] = "transformers" in sys.modules
metadata.version = real
stub = sys.modules["transformers"] = types.ModuleType("transformers")
with late_transformers.without_transformers():
    found["no spec"] = sys.modules["transformers"] is stub
"""
FAULTS = ("ImportError('no symbol')", "AttributeError('no symbol')")

BODIES = (
    START,
    DIFFUSERS,
    SCIPY,
    WRAPPERS,
    FORWARD,
    MARKS,
    FIRST_MODULE,
    FAILING_PART,
    MISSING,
    *(TWO_THREADS.format(module=module) for module in OF_COMPILER),
    *(BROKEN.format(error=error) for error in FAULTS),
    *(TRANSFORMERS.format(first=first) for first in FIRSTS),
    *(COMPILER.format(use=use) for use in USES),
)


@pytest.fixture(scope="module")
def run() -> Run:
    """Return what a body has found."""
    children = (
        IN_A_CHILD.format(number=number, body=textwrap.indent(body, "    ")) for number, body in enumerate(BODIES)
    )
    program = PROGRAM + "".join(children)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    results = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))

    def find(body: str) -> Any:
        number = BODIES.index(body)
        assert number in results, done.stderr[-4000:]
        return results[number]

    return find


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


@pytest.mark.parametrize("use", USES)
def test_the_compiler_is_imported_when_more_than_its_marks_is_asked_for(run: Run, use: str) -> None:
    found = run(COMPILER.format(use=use))
    assert found == {
        "before": [],
        "marked": 8,
        "after marks": [],
        "package": ["module", True, "torch._dynamo.decorators"],
        "compiled": 2.0,
        "ring": True,
    }


@pytest.mark.parametrize("error", FAULTS)
def test_a_compiler_that_cannot_be_imported_says_why_each_time_and_marks_go_on(run: Run, error: str) -> None:
    assert run(BROKEN.format(error=error)) == {"said": ["no symbol"] * 4, "marked": [True] * 3, "later": 2.0}


def test_what_is_not_installed_has_no_place(run: Run) -> None:
    found = run(MISSING)
    assert "enable_wrap() takes 0 positional arguments" in found.pop("called")
    assert found == {
        "late": [None, "LateModule", "LateModule"],
        "ours": [True] * 3,
        "no version": False,
        "no spec": True,
    }


@pytest.mark.parametrize("module", OF_COMPILER)
def test_two_threads_that_import_the_compiler_at_once_do_not_wait_for_each_other(run: Run, module: str) -> None:
    assert run(TWO_THREADS.format(module=module)) == {"faults": [], "imported": True}


def test_marks_that_were_made_before_the_compiler_was_imported_hold_for_it(run: Run) -> None:
    left = ("function", "method", "why", "object", "torch", "module")
    assert run(MARKS) == {
        "eager": [10] * 6,
        "before": False,
        "compiled": {**dict.fromkeys(left, 10), "parts": 1},
        "marked": [True, 1],
        "whole": [True, True],
        "why": True,
        "many": 200,
    }


def test_a_module_of_the_compiler_that_is_imported_first_is_imported_once(run: Run) -> None:
    assert run(FIRST_MODULE) == {"same": [True, True]}


def test_a_compiler_of_which_one_part_failed_is_imported_later(run: Run) -> None:
    assert run(FAILING_PART) == {"later": 2.0}


def test_all_of_diffusers_is_there_when_it_is_asked_for(run: Run) -> None:
    found = run(DIFFUSERS)
    assert found == {
        "classes": ["FluxTransformer2DModel", "SanaTransformer2DModel", "WanTransformer3DModel"],
        "count": 12,
        "same": True,
        "pipeline": "diffusers.pipelines.pipeline_utils",
        "unknown": False,
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
