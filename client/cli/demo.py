"""``xditd demo``: lend a small model, make images, and compare with diffusers."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from typing import Final

from xditd.client.cli import exits, flags
from xditd.client.cli.printing import json_text
from xditd.ipc.settings.client import DemoFlags

SUMMARY = "run everything once on a small model"
DESCRIPTION = """\
Start a daemon with two workers (on GPUs if there are any), lend a small FLUX.1 and its VAE to it from this process,
generate images, and compare with plain diffusers. In a source checkout that has the weights of models/shapes, three
images show what their sentences say, one of them Chinese, and demo.html shows them; of 256x256 pixels and four steps
or more they are read back and compared with the sentences. Elsewhere weights are random, and two images show areas of
colour. Nothing is downloaded."""
EXAMPLES = """\
examples:
  xditd demo --out out             writes pictures, demo.json, daemon.log and checkpoints/ into out/
  xditd demo --device cpu --keep   then: xditd status --runtime-dir FOLDER, which it prints
"""

_OUTPUT_BYTES: Final = 80 * 2**20
"""Upper bound of the output: 54 MiB of checkpoints, images, inputs and latents."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_settings(parser, DemoFlags)


def run(parsed: argparse.Namespace) -> int:
    exits.configure_logging(parsed.log_level, parsed.verbose)

    from xditd.client.cli.progress import bar
    from xditd.client.demo.journey import DemoOptions, DemoRun
    from xditd.client.output_files import check_folder
    from xditd.client.tensor_files import require_torch

    check_folder(parsed.out, _OUTPUT_BYTES)
    require_torch()
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup(1)
        signal.signal(signal.SIGHUP, _interrupt)  # the terminal was closed
    options = DemoOptions(
        out=parsed.out,
        workers=parsed.workers or 0,
        device=parsed.device,
        size=parsed.size,
        steps=parsed.steps,
        keep=parsed.keep,
    )
    with contextlib.ExitStack() as stack:
        steps = stack.enter_context(bar(DemoRun.length(options), "demo", is_quiet=parsed.json, shows_eta=False))
        if not parsed.json:
            from tqdm.contrib.logging import logging_redirect_tqdm

            stack.enter_context(logging_redirect_tqdm())  # print log lines above the bar
        report = DemoRun(options, steps).run()
        steps.set_description_str("done")
    print(json_text(report.as_json(), indent=2) if parsed.json else report.summary())
    faults = report.faults()
    for fault in faults:
        print(f"xditd demo: {fault}", file=sys.stderr)
    return exits.FAILED if faults else exits.DONE


def _interrupt(*_: object) -> None:
    """Raise what Ctrl-C raises, so that the daemon is stopped."""
    raise KeyboardInterrupt
