"""``accelerate`` costs nothing until it is called."""

from __future__ import annotations

import subprocess
import sys


def test_import_of_accelerate_imports_no_torch() -> None:
    program = (
        "import sys; from xditd.client import accelerate; assert callable(accelerate); "
        "print([name for name in ('torch', 'diffusers', 'transformers', 'numpy') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
