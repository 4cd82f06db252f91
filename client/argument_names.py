"""Arguments that a method does not take: what they are called here, or which name is the closest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar

from xditd.ipc.errors import BadRequest
from xditd.ipc.suggestions import did_you_mean

P = ParamSpec("P")
T = TypeVar("T")

_EMBEDS: Final = "give the tensors by their names, conditioning={{{name!r}: ...}}"
_OPTIONS: Final = "it is one of options, options={{{name!r}: ...}}"
_DIFFUSERS: Final = "accelerate(pipe) runs pipelines of diffusers with all of their arguments"
_ADAPTERS: Final = f"IP adapters are not run; {_DIFFUSERS}"
_DOWNLOADS: Final = "nothing is downloaded: give a folder or files of this machine"
_LORAS: Final = "LoRAs are given as loras=[('x.safetensors', 0.8)]"
_RESULT: Final = "the result has images, videos, to_numpy() and generation, with the tensors"
_CONTROLS: Final = "it is an argument of Control(controlnet, picture, scale=..., start=..., end=...), given as control="

ELSEWHERE: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "num_inference_steps": (("steps",), ""),
    "guidance_scale": (("guidance",), "the scale that the model uses, which for Qwen-Image is true_cfg_scale"),
    "true_cfg_scale": (
        ("guidance", "guidance_scale"),
        "of Qwen-Image; FLUX.1 beside guidance_scale has none here",
    ),
    "cfg": (("guidance", "guidance_scale"), ""),
    "cfg_scale": (("guidance", "guidance_scale"), ""),
    "guidance_scale_2": ((), _OPTIONS),
    "num_images_per_prompt": (("num_images",), ""),
    "num_videos_per_prompt": (("num_images",), ""),
    "num_frames": (("frames",), ""),
    "generator": (("seed",), "give seed=7 in place of torch.Generator('cpu').manual_seed(7)"),
    "latents": (("noise",), ""),
    "timesteps": (("sigmas",), "values in (0, 1], which are timesteps / 1000"),
    "mask_image": (("mask", "start_mask"), ""),
    "start_image": (("image",), ""),
    "start_mask": (("mask",), ""),
    "control_image": (("control",), ""),
    "video": (("control",), "a list of pictures"),
    "reference_images": (("references",), ""),
    "images": (("references",), ""),
    "controls": (("control",), ""),
    "controlnet_conditioning_scale": ((), _CONTROLS),
    "control_guidance_start": ((), _CONTROLS),
    "control_guidance_end": ((), _CONTROLS),
    "control_mode": ((), _CONTROLS),
    "ip_adapter_image": ((), _ADAPTERS),
    "ip_adapter_image_embeds": ((), _ADAPTERS),
    "negative_ip_adapter_image": ((), _ADAPTERS),
    "negative_ip_adapter_image_embeds": ((), _ADAPTERS),
    "negative_prompt_2": ((), f"the classifier-free guidance of FLUX.1 is not run; {_DIFFUSERS}"),
    "padding_mask_crop": ((), f"pictures are not cropped to their masks; {_DIFFUSERS}"),
    "masked_image_latents": ((), "give the picture and its mask, image= and mask="),
    "max_area": ((), "references have the sizes that Kontext was trained with"),
    "_auto_resize": ((), "references have the sizes that Kontext was trained with"),
    "text_encoder_out_layers": ((), "the layers are those that the model was trained with"),
    "caption_upsample_temperature": ((), f"prompts are read as they are; {_DIFFUSERS}"),
    "cfg_normalization": ((), _OPTIONS),
    "cfg_truncation": ((), _OPTIONS),
    "shift": ((), _OPTIONS),
    "conditioning_scale": ((), _OPTIONS),
    "prompt_embeds": (("conditioning",), _EMBEDS),
    "pooled_prompt_embeds": (("conditioning",), _EMBEDS),
    "prompt_embeds_mask": (("conditioning",), _EMBEDS),
    "negative_prompt_embeds": (("conditioning",), _EMBEDS),
    "negative_pooled_prompt_embeds": (("conditioning",), _EMBEDS),
    "negative_prompt_embeds_mask": (("conditioning",), _EMBEDS),
    "image_embeds": (("conditioning",), _EMBEDS),
    "joint_attention_kwargs": ((), _LORAS),
    "attention_kwargs": ((), _LORAS),
    "cross_attention_kwargs": ((), _LORAS),
    "output_type": ((), _RESULT),
    "return_dict": ((), _RESULT),
    "callback": (("on_progress",), ""),
    "callback_on_step_end": (("on_progress", "previews"), ""),
    "callback_on_step_end_tensor_inputs": ((), "on_preview= gets a picture after each step"),
    "previews": (("on_preview",), "a function that gets pictures"),
    "prompt": (("conditioning",), "words become tensors by encode_prompt"),
    "size": ((), "give width= and height="),
    "on_progress": ((), "iterate over the job for its steps"),
    "on_preview": ((), "give previews=True, and call job.preview() after a step"),
    # Of ``open``.
    "pretrained_model_name_or_path": (("source",), "the first argument"),
    "path": (("source",), "the first argument"),
    "model": (("source", "transformer"), ""),
    "text_encoder": (("text_encoders",), "a list"),
    "text_encoder_2": (("text_encoders",), "a list"),
    "text_encoder_3": (("text_encoders",), "a list"),
    "tokenizer": (("tokenizers",), "a folder, or paths by role"),
    "tokenizer_2": (("tokenizers",), "a folder, or paths by role"),
    "torch_dtype": ((), "weights keep the dtype of their files, and compute_dtype is that of packed ones"),
    "dtype": ((), "weights keep the dtype of their files, and compute_dtype is that of packed ones"),
    "device_map": ((), "the daemon's groups say which GPUs run a model"),
    "cache_dir": ((), _DOWNLOADS),
    "local_files_only": ((), _DOWNLOADS),
    "revision": ((), _DOWNLOADS),
    "token": ((), _DOWNLOADS),
    "use_safetensors": ((), "only safetensors and GGUF files are read"),
}
"""Names of arguments in diffusers and in other methods here: what ours are called, best first, and what to know."""


def unknown_argument(name: str, known: Collection[str], where: str) -> BadRequest:
    """Return the error of an argument that ``where`` does not take; it names what is meant, as far as that is known."""
    names, hint = ELSEWHERE.get(name, ((), ""))
    own = next((each for each in names if each in known), None)
    hint = hint.format(name=name) if hint in (_EMBEDS, _OPTIONS) else hint
    if own is not None:
        return BadRequest(f"{name}: it is called {own} here{': ' if hint else ''}{hint}")
    if hint and not names:
        return BadRequest(f"{name}: no argument of {where}: {hint}")
    remedy = did_you_mean(name, known) or f"; it takes {', '.join(known)}"
    return BadRequest(f"{name}: no argument of {where}{remedy}")


def check_names(given: Iterable[str], known: Collection[str], where: str) -> None:
    """Refuse the first argument that is not known.

    Raises:
        BadRequest: names it, and what it is called here or which name is the closest.
    """
    for name in given:
        if name not in known:
            raise unknown_argument(name, known, where)


def names_unknown(where: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator of methods: an unknown keyword is a ``BadRequest`` with the name that is meant."""

    def decorate(method: Callable[P, T]) -> Callable[P, T]:
        code: Any = method.__code__
        known = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]  # without self

        @wraps(method)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            check_names(kwargs, known, where)
            if len(args) > code.co_argcount:
                places = ", ".join(known[: code.co_argcount - 1]) or "none"
                raise BadRequest(
                    f"{where}: {len(args) - 1} arguments without names, and such are {places}; give the others by name"
                )
            return method(*args, **kwargs)

        return checked

    return decorate
