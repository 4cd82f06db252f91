"""The table of benchmarks/comfyui_path.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def print_table(report: Mapping[str, Any], titles: Mapping[str, str]) -> None:
    machine = report["machine"]
    print(f"\n{', '.join(machine['gpus']) or machine['cpu']}; Python {machine['python']}")
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    print(f"{report['pixels']} pixels, {report['tokens']} tokens, {report['steps'][0]} steps")
    for group in report["groups"]:
        about = group.get("comfyui", {})
        print(f"\n{group['workers']} worker(s); ComfyUI: {', '.join(f'{k} {v}' for k, v in about.items())}")
        for name, found in group["paths"].items():
            print(f"  {titles[name]}")
            for row in rows_of(found, group):
                print(f"    {row[0]:42} {row[1]}")
    if "against_stock" in report:
        print("\nlatents of one seed, relative difference from stock ComfyUI")
        for name, error in sorted(report["against_stock"].items()):
            print(f"    {name:42} {error:.2e}")


def rows_of(found: Mapping[str, Any], group: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for what in ("first", "second"):
        if what in found:
            run = found[what]
            rows.append((f"{what}: queue to latents, to image", f"{run['latents_s']:.2f} s, {run['image_s']:.2f} s"))
    for each in found.get("lent", []):
        copied = ", ".join(f"{kind} {gib:.2f} GiB" for kind, gib in each["copied_gib"].items() if gib) or "nothing"
        rows.append(
            (f"lent: {each['label']}", f"{'+'.join(each['tiers'])}, {each['lent_gib']:.2f} GiB; copied {copied}")
        )
    memory = found.get("memory", {})
    if memory.get("ran", {}).get("by_gpu_gib"):
        for what in ("ran", "unloaded"):
            if what in memory:
                more = [
                    after - idle
                    for after, idle in zip(memory[what]["by_gpu_gib"], group["idle"]["by_gpu_gib"], strict=True)
                ]
                rows.append((f"GPU memory beyond idle, {what}", ", ".join(f"{gib:+.2f} GiB" for gib in more)))
    if "step_ms" in found:
        rows.append(("a step (more steps less fewer)", f"{found['step_ms']:.1f} ms"))
        rows.append(("a step (median between two progress reports)", f"{found['gap_ms']:.1f} ms"))
    for what, title in (
        ("forward_ms", "the remote forward"),
        ("call_ms", "  of which the client's call"),
        ("denoise_ms", "  of which the client's denoise()"),  # as it was called in older results
    ):
        if what in found:
            rows.append((title, f"{found[what]:.1f} ms"))
    generate = group["paths"].get("fused", {}).get("generate_step_ms")
    if generate and "step_ms" in found:
        rows.append(
            (
                "a step of generate in the workers",
                f"{generate:.1f} ms: {found['step_ms'] / generate:.3f}x, {found['gap_ms'] / generate:.3f}x",
            )
        )
    if found.get("worker_ms"):
        rows.append(("last job in the workers, ms", ", ".join(f"{k} {v:.1f}" for k, v in found["worker_ms"].items())))
    lora = found.get("lora")
    if lora:
        rows.append(("LoRA: first time, to latents", f"{lora['first']['latents_s']:.2f} s"))
        rows.append(("LoRA: another strength costs", ", ".join(f"{each:.2f} s" for each in lora["change_s"])))
        rows.extend(("", line.split("] ")[-1]) for line in lora["again"]["said"] if "patched" in line or "lent" in line)
    return rows
