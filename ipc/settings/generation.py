"""Flags of the verbs that make pictures and videos: ``generate`` and ``cluster``."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from xditd.ipc import limits
from xditd.ipc.settings.daemon import LogLevel
from xditd.ipc.settings.flags import VERBOSE, DaemonFlags, Steps
from xditd.ipc.settings.setting import about
from xditd.ipc.tensors import ComputeDType

_Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class JobFlags(DaemonFlags, frozen=True, kw_only=True):
    """Flags of a generation, of ``generate`` and ``cluster``."""

    log_level: Annotated[
        LogLevel | None,
        about(
            "lowest level that is logged on stderr: debug, info, warning or error (default: warning; info of "
            "`cluster join`)",
            metavar="LEVEL",
        ),
    ] = None
    verbose: Annotated[bool, VERBOSE] = False
    transformer: Annotated[
        str | None,
        about(
            "transformer checkpoint, a safetensors or GGUF file; for `generate` also an index of shards, or the folder "
            "of one model",
            kind="path",
        ),
    ] = None
    transformer_2: Annotated[
        str | None, about("second transformer, for the steps at low noise, such as that of Wan 2.2 A14B", kind="path")
    ] = None
    vae: Annotated[
        str | None, about("VAE checkpoint; without it only latents are computed (--save-latents)", kind="path")
    ] = None
    embeds: Annotated[str | None, about("safetensors file with the text embeddings", kind="path")] = None
    random_embeds: Annotated[_Seed | None, about("use random embeddings instead", metavar="SEED")] = None
    text_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=65_536)] | None,
        about("text tokens of --random-embeds (default: 512)", metavar="COUNT"),
    ] = None
    size: Annotated[
        str | None,
        about("image size in pixels (default: the model's own; 1024x1024 of single files)", kind="size"),
    ] = None
    frames: Annotated[
        Annotated[int, Meta(ge=1, le=limits.MAX_FRAMES)] | None,
        about("frames of a video (default: the model's own; one, an image, of single files)", metavar="COUNT"),
    ] = None
    fps: Annotated[
        Annotated[int, Meta(ge=1, le=1_000)] | None,
        about("frames a second of an .mp4 (default: the model's own, or 16)", metavar="COUNT"),
    ] = None
    steps: Annotated[Steps | None, about("denoising steps (default: the model's own)", metavar="COUNT")] = None
    seed: Annotated[_Seed | None, about("seed of the noise (default: random, and reported)", metavar="SEED")] = None
    guidance: Annotated[
        Annotated[float, Meta(ge=0, le=limits.MAX_GUIDANCE)] | None,
        about("guidance scale (default: the model's own)", metavar="SCALE"),
    ] = None
    step_cache: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        about("skip steps whose first block changes less than this, such as 0.08; not lossless", metavar="SHARE"),
    ] = None
    option: Annotated[
        str | None,
        about(
            "an option of the model family, such as Z-Image's shift=3, cfg_normalization=1 or cfg_truncation=0.8; "
            "may be repeated; the variable takes several, separated by commas",
            kind="named values",
            variable="XDITD_OPTIONS",
        ),
    ] = None
    lora: Annotated[
        str | None,
        about(
            "file or folder of a LoRA of the transformer, and its strength, such as style.safetensors=0.8 or "
            "style.safetensors:0.8; may be repeated; the variable takes several, separated by commas",
            kind="strengths",
            variable="XDITD_LORAS",
        ),
    ] = None
    lora_2: Annotated[
        str | None,
        about(
            "as --lora, of the second transformer, such as that of Wan 2.2 at low noise",
            kind="strengths",
            variable="XDITD_LORAS_2",
        ),
    ] = None
    device: Annotated[
        str | None,
        about(
            "load the weights to this device first (cuda, cuda:1), to lend them by CUDA IPC",
            variable="XDITD_LEND_DEVICE",
            metavar="DEVICE",
        ),
    ] = None
    compute_dtype: Annotated[
        ComputeDType | None,
        about(
            "dtype into which packed weights are dequantised: bfloat16, float16 or float32 (default: that of the plain "
            "weights beside them)",
            metavar="DTYPE",
        ),
    ] = None
    out: Annotated[
        str | None,
        about(
            "image file; several become out-0.png and so on; with a slash at the end a folder, which numbers them. "
            "Of a video an .mp4, or a folder of PNG files (default: out.png or out.mp4)",
            kind="target",
            short="-o",
        ),
    ] = None
    save_latents: Annotated[str | None, about("also write the latents to a safetensors file", kind="path")] = None
    no_metadata: Annotated[bool, about("do not write into files how they were made")] = False


class GenerateFlags(JobFlags, frozen=True, kw_only=True):
    """Flags of ``generate``: those of words and pictures follow."""

    model: Annotated[
        str | None,
        about(
            "a name of `xditd models`, a folder of a pipeline, or an all-in-one checkpoint; parts beside it replace "
            "its own",
        ),
    ] = None
    text_encoders: Annotated[
        str | None,
        about(
            "text encoder checkpoint; may be repeated, in any order; the variable takes several, separated by colons",
            flag="--text-encoder",
            variable="XDITD_TEXT_ENCODERS",
            kind="paths",
        ),
    ] = None
    tokenizers: Annotated[
        str | None, about("folder with the tokenizers, or that of a ComfyUI", kind="path", metavar="DIR")
    ] = None
    image_encoder: Annotated[str | None, about("CLIP vision checkpoint, of Wan 2.1 from images", kind="path")] = None
    scheduler: Annotated[str | None, about("scheduler_config.json in place of the model's own", kind="path")] = None
    variant: Annotated[
        str | None,
        about("variant of a folder's weights, such as fp16", variable="XDITD_WEIGHTS_VARIANT", metavar="NAME"),
    ] = None
    prompt_2: Annotated[
        str | None, about("what the second text encoder reads in place of PROMPT, of FLUX.1 its T5", metavar="TEXT")
    ] = None
    negative_prompt: Annotated[str | None, about("what the picture must not show", metavar="TEXT")] = None
    max_sequence_length: Annotated[
        Annotated[int, Meta(ge=1, le=limits.MAX_TEXT_TOKENS)] | None,
        about("tokens to which prompts are padded or cut (default: the model's own)", metavar="COUNT"),
    ] = None
    num_images: Annotated[
        Annotated[int, Meta(ge=1, le=limits.MAX_BATCH)] | None,
        about("pictures or videos of the prompt (default: 1)", short="-n", metavar="COUNT"),
    ] = None
    image: Annotated[
        str | None, about("picture to start from (--strength), or that the video begins with", kind="path")
    ] = None
    mask: Annotated[str | None, about("mask of --image: white is made anew", kind="path")] = None
    last_image: Annotated[str | None, about("picture that the video ends with", kind="path")] = None
    references: Annotated[
        str | None,
        about(
            "picture that the prompt refers to; may be repeated; the variable takes several, separated by colons",
            flag="--reference",
            variable="XDITD_REFERENCES",
            kind="paths",
        ),
    ] = None
    control_images: Annotated[
        str | None,
        about(
            "control picture, such as edges or depth, of a model that takes them without a ControlNet; of a video "
            "repeated, one for each frame; the variable takes several, separated by colons",
            flag="--control-image",
            variable="XDITD_CONTROL_IMAGES",
            kind="paths",
        ),
    ] = None
    strength: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        about("how much of --image is made anew, from 0 to 1 (default: the model's own)", metavar="SHARE"),
    ] = None
    from_file: Annotated[
        str | None,
        about(
            "repeat this picture or video, by what its metadata say; other flags replace parts of that",
            flag="--from",
            variable="XDITD_FROM",
            kind="path",
        ),
    ] = None


class ClusterFlags(JobFlags, frozen=True, kw_only=True):
    """Flags of ``cluster``: those of a generation are for ``submit``."""

    address: Annotated[
        str | None,
        about("the head's IP address and port, such as 10.0.0.1:6379", variable="XDITD_CLUSTER", metavar="IP:PORT"),
    ] = None
    head: Annotated[bool, about("join as the head, at --address", variable="XDITD_CLUSTER_HEAD")] = False
    name: Annotated[
        str | None,
        about("name of a host in the cluster (default: its host name)", variable="XDITD_CLUSTER_NAME", metavar="NAME"),
    ] = None
    search_path: Annotated[
        str | None,
        about(
            "folders whose checkpoint files this host lends, separated by colons; needed to join",
            variable="XDITD_CLUSTER_SEARCH_PATH",
            metavar="DIR:DIR",
        ),
    ] = None
    ray_temp_dir: Annotated[
        str | None,
        about("folder of Ray's logs and sockets, of the head", kind="path", variable="XDITD_CLUSTER_RAY_TEMP_DIR"),
    ] = None
    accept_remote_code: Annotated[
        bool,
        about(
            "join although whoever holds the cluster's token can run code as this user on this host",
            variable="XDITD_CLUSTER_ACCEPT_REMOTE_CODE",
        ),
    ] = False
