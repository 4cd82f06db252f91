"""The help of ``xditd generate``."""

from __future__ import annotations

from typing import Final

SUMMARY: Final = "generate images and videos from words, pictures, or text embeddings"
DESCRIPTION: Final = """\
Generate images or videos. With a prompt, --model names what to use: a name of `xditd models`, a folder of a pipeline
that diffusers has saved, or an all-in-one checkpoint; or the parts are named by --transformer, --vae, --text-encoder
and --tokenizers. The workers run the tokenizers and text encoders, too. What is not given is the model's own: size,
steps, guidance, frames. An option that a model cannot honour is refused by name.

PNG, JPEG, WebP and MP4 files say how they were made, and --from FILE repeats one: its prompt, seed, settings, model and
LoRAs, of which other flags replace any. --no-metadata leaves that out.

Without a prompt, --embeds names a safetensors file with the embeddings of one, and a transformer and a VAE are lent by
their files (safetensors, GGUF) or folders. Its tensors have the names that the transformer takes:

  FLUX.1   prompt_embeds (batch, text tokens, context) and pooled_prompt_embeds (batch, pooled)
  Z-Image  a list of one tensor for each image, (text tokens, context), of any lengths: prompt_embeds.0, prompt_embeds.1
           and so on; with --guidance above 0 also negative_prompt_embeds.0 and so on
  FLUX.2   prompt_embeds (batch, text tokens, context); for klein with --guidance above 1 also negative_prompt_embeds
  Qwen-Image  prompt_embeds (batch, text tokens, context); with --guidance above 1 also negative_prompt_embeds; for
           padded texts also prompt_embeds_mask and negative_prompt_embeds_mask, floating, 1 where a token counts
  Wan      prompt_embeds and, with --guidance above 1, negative_prompt_embeds (batch, 512, context); from images image,
           last_image (1, 3, height, width) in [-1, 1] and for Wan 2.1 image_embeds; for VACE video, mask,
           reference_images.0 and so on

For one image, the batch dimension may be left out, and so may the number of a list's only tensor. If the file lacks a
tensor, the error names it. --random-embeds draws a test pattern instead."""
EXAMPLES: Final = """\
examples:
  xditd generate "a cat" --model ~/models/Qwen-Image -o cat.png
  xditd models add flux --transformer flux1-dev.safetensors --vae ae.safetensors --text-encoder clip_l.safetensors \\
      --text-encoder t5xxl_fp16.safetensors --tokenizers ~/ComfyUI
  xditd generate "a cat" --model flux --lora style.safetensors:0.8 -n 4 -o cats/
  xditd generate "a cat" --model wan --negative-prompt "blurred" --frames 81 -o cat.mp4
  xditd generate "make it grey" --model qwen-edit --reference cat.png -o grey.png
  xditd generate --from cats/00002.png --steps 50 -o better.png

from files and embeddings:
  xditd generate --transformer flux1-dev.safetensors --vae ae.safetensors --embeds cat.safetensors -o cat.png
  xditd generate --transformer z_image_turbo_bf16.safetensors --vae ae.safetensors --embeds cat.safetensors \\
      --steps 8 --option shift=3 -o cat.png
  xditd generate --transformer flux2-dev.safetensors --vae flux2-vae.safetensors --embeds cat.safetensors -o cat.png
  xditd generate --transformer qwen_image_bf16.safetensors --vae qwen_image_vae.safetensors --embeds cat.safetensors \\
      --guidance 4 -o cat.png
  xditd generate --transformer wan2.2_t2v_high_noise_14B_fp16.safetensors \\
      --transformer-2 wan2.2_t2v_low_noise_14B_fp16.safetensors --vae wan_2.1_vae.safetensors \\
      --embeds cat.safetensors --size 1280x720 --frames 81 --guidance 4 \\
      --option guidance_scale_2=3,shift=12 -o cat.mp4
  xditd generate --transformer flux1-dev-Q8_0.gguf --vae ae.safetensors --embeds cat.safetensors -o cat.png
  xditd generate --transformer flux1-dev.safetensors --lora style.safetensors=0.8 --lora detail.safetensors=-0.3 \\
      --vae ae.safetensors --embeds cat.safetensors -o cat.png
  xditd generate --transformer flux1-dev.safetensors --control union.safetensors=edges.png@0.6:end=0.8:mode=0 \\
      --vae ae.safetensors --embeds cat.safetensors -o cat.png
  xditd generate --transformer t.safetensors --vae v.safetensors --random-embeds 1 --size 512x512 --steps 4

cat.safetensors for FLUX.1, made with diffusers:
  pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", transformer=None, vae=None)
  embeds, pooled, _ = pipe.encode_prompt("a cat", None)
  safetensors.torch.save_file({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}, "cat.safetensors")

for Z-Image:
  pipe = ZImagePipeline.from_pretrained("Tongyi-MAI/Z-Image-Turbo", transformer=None, vae=None)
  embeds, negatives = pipe.encode_prompt(["a cat", "a grey cat"])
  lists = {"prompt_embeds": embeds, "negative_prompt_embeds": negatives}
  tensors = {f"{name}.{number}": each for name, found in lists.items() for number, each in enumerate(found)}
  safetensors.torch.save_file(tensors, "cat.safetensors")

Several images are written as cat-0.png, cat-1.png and so on, and several videos as cat-0.mp4; -o cats/ numbers them in
a folder, from its next number on. For a video, a path without a suffix is a folder of PNG files; an .mp4 needs PyAV:
pip install 'xditd[video]'.
"""
