"""A record with every field."""

from __future__ import annotations

from xditd.client.metadata.record import FileRecord, InputsRecord, LoraRecord, ModelRecord, Record

FILE = FileRecord(name="flux1-dev.safetensors", bytes=7, sample="0" * 64, sha256="f" * 64)
WHOLE = Record(
    version="0.1.0",
    prompt='a "cat" \\ 猫 🐈\n',
    negative_prompt="",
    seed=2**63 - 1,
    index=1,
    num_images=4,
    width=1024,
    height=768,
    frames=81,
    fps=16,
    steps=20,
    guidance=3.5,
    strength=0.6,
    step_cache=0.08,
    options={"shift": 3.0, "cfg": True, "n": 2},
    variant="float32_time",
    compute_dtype="float16",
    model=ModelRecord(name="flux", family="flux1", files={"transformer": (FILE,), "vae": (FileRecord(name="ae"),)}),
    loras=(LoraRecord(file=FILE, strength=-0.5), LoraRecord(file=FILE, strength=((0, 0.0), (3, 1.0)))),
    inputs=InputsRecord(image=1, references=2, embeds=FILE),
)
