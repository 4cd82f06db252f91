"""torch's meta kernels in Python: left out of the leader's first import of torch, and all there for the first lend."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

REPORT = """
registered = torch._C._dispatch_get_registrations_for_dispatch_key
found |= {key: sorted(registered(key)) for key in ("Meta", "CompositeImplicitAutograd", "CPU")}
found["names"] = sorted(each for each in vars(torch._meta_registrations) if not each.startswith("_"))
"""
DEFERRED = """
import json, sys, threading
from xditd.gpu_workers.process.lazy_meta_kernels import defer_meta_kernels
defer_meta_kernels()
import torch
from xditd.gpu_workers.process import leader, preload
found = {"before": [name for name in ("torch._prims", "torch._refs", "torch._decomp") if name in sys.modules]}
with torch.device("meta"):
    found["c++"] = list(torch.nn.Linear(2, 3)(torch.empty(4, 2)).shape)
USE
"""
LEND = """
from xditd.gpu_workers.process.late_imports import LateImports
LateImports().finish_for_lend()
"""
NAME = """
from torch._meta_registrations import meta_index_Tensor
"""
THREADS = """
def use(faults=[]):
    try:
        torch._meta_registrations.meta_index_Tensor
    except BaseException as error:
        faults.append(repr(error))
    return faults
threads = [threading.Thread(target=use) for _ in range(4)]
[each.start() for each in threads], [each.join() for each in threads]
assert not use()
"""
LATER = """
import json, torch
found = {}
from xditd.gpu_workers.process.lazy_meta_kernels import defer_meta_kernels
module = torch._meta_registrations
defer_meta_kernels()
assert torch._meta_registrations is module
"""
PRINT = """
print(json.dumps(found))
"""


def run(program: str) -> Any:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def usual() -> Any:
    """What a usual import of torch registers."""
    return run("import json, torch\nfound = {}" + REPORT + PRINT)


@pytest.mark.parametrize("use", [LEND, NAME, THREADS], ids=["lend", "name", "threads"])
def test_meta_kernels_are_those_of_a_usual_import_once_they_are_needed(usual: Any, use: str) -> None:
    found = run(DEFERRED.replace("USE", use) + REPORT + PRINT)
    assert (found.pop("before"), found.pop("c++")) == ([], [4, 3])
    if use == LEND:  # diffusers registers more
        found = {key: sorted(set(names) & set(usual[key])) for key, names in found.items()}
    assert found == usual


def test_a_process_that_has_torch_already_keeps_it(usual: Any) -> None:
    assert run(LATER + REPORT + PRINT) == usual
