"""When ranks import torch's compiler, in processes that are forked from one with a rank's first imports."""

from __future__ import annotations

import pytest
from forked_bodies import Run, run_bodies

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
IN_PARTS = """
from xditd.gpu_workers.models import block_compiler
from xditd.gpu_workers.process import late_imports, preload
preload.import_all(late_imports.FOR_GRAPHS)
assert block_compiler.has_loaders() and all(map(lean_imports.is_imported, late_imports.FOR_GRAPHS))
"""
USES = (
    "torch.compile(lambda x: x, backend='eager')(torch.ones(1))",
    "import torch._dynamo.utils",
    "from torch._dynamo import config",
    "import torch._inductor.compile_fx",
    "from torch.nn.attention.flex_attention import flex_attention",
    "torch._dynamo.reset()",
    "from torch._dynamo import trace_rules; trace_rules.lookup(torch.sin); trace_rules.clear_lru_cache()",
    "from torch._dynamo import *; optimize",
    "from xditd.gpu_workers.process import preload; preload.import_all(preload.AFTER_LENDS)",
    IN_PARTS,
)

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
import importlib
first = importlib.import_module("torch._dynamo.{module}")
from torch._dynamo import convert_frame
found["same"] = [convert_frame.{module} is first, torch._dynamo.{module} is first]
found["spec"] = [first.__spec__.origin == first.__file__, first.__spec__.loader is first.__loader__]
"""
FIRST_MODULES = ("config", "exc")  # the first refuses to be given another spec
FIRST_NAME = """
from torch._dynamo import run
found["same"] = run is torch._dynamo.decorators.run
"""
FAILING_PART = """
from xditd.gpu_workers.process import lazy_compiler
for name in ("torch._dynamo", lazy_compiler._FLEX_ATTENTION_PART):
    del sys.modules[name]
class Broken:
    def find_spec(name, path=None, target=None):
        if name == lazy_compiler._FLEX_ATTENTION_PART:
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
FAULTS = ("ImportError('no symbol')", "AttributeError('no symbol')")

NUMERICS = """
from xditd.gpu_workers.jobs.numerics import use_numerics
from xditd.ipc.job_parts import Numerics
with use_numerics(Numerics(), torch.device("cpu")):
    found["compiler"] = lean_imports.is_imported("torch._dynamo")
found["deterministic"] = []
for wanted in (True, False):
    with use_numerics(Numerics(is_deterministic=wanted), torch.device("cpu")):
        found["deterministic"].append(torch.are_deterministic_algorithms_enabled())
    found["deterministic"].append(torch.are_deterministic_algorithms_enabled())
"""

BODIES = (
    MARKS,
    NUMERICS,
    *(FIRST_MODULE.format(module=module) for module in FIRST_MODULES),
    FIRST_NAME,
    FAILING_PART,
    *(BROKEN.format(error=error) for error in FAULTS),
    *(COMPILER.format(use=use) for use in USES),
)


@pytest.fixture(scope="module")
def run() -> Run:
    return run_bodies(BODIES)


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


@pytest.mark.parametrize("module", FIRST_MODULES)
def test_a_module_of_the_compiler_that_is_imported_first_is_imported_once(run: Run, module: str) -> None:
    assert run(FIRST_MODULE.format(module=module)) == {"same": [True, True], "spec": [True, True]}


def test_a_name_of_the_compiler_is_its_own_whatever_the_placeholder_has(run: Run) -> None:
    assert run(FIRST_NAME) == {"same": True}


def test_the_usual_numerics_of_a_call_import_no_compiler(run: Run) -> None:
    assert run(NUMERICS) == {"compiler": False, "deterministic": [True, False, False, False]}


def test_a_compiler_of_which_one_part_failed_is_imported_later(run: Run) -> None:
    assert run(FAILING_PART) == {"later": 2.0}
