"""Limits on everything that arrives from another process."""

from __future__ import annotations

from typing import Final

MAX_MESSAGE_BYTES: Final = 4 * 2**20
"""One message on any socket. A manifest of 1,200 tensors takes 0.1 MiB, one of :data:`MAX_TENSORS` 2 MiB."""

MAX_MAPS: Final = 32_768
MAX_ARRAYS: Final = 98_304
"""Maps and arrays in one message, at any depth: three arrays for a tensor and two more for a packed one, two maps for a
block, and some more."""

MAX_TENSORS: Final = 16_384
"""Tensors in one manifest."""

MAX_BLOCKS: Final = 4_096
"""Blocks in one manifest (torch's own allocator gives a transformer of 12 billion parameters about 300)."""

MAX_MODULE_STATE_BYTES: Final = 2**20
MAX_PLAIN_MODULE_STATE_BYTES: Final = 32 * 2**20
"""The attributes of a module's submodules, compressed and plain. Those of FLUX.1 take 12 KiB and 0.5 MiB."""

MAX_COMMAND_BYTES: Final = MAX_MESSAGE_BYTES + 2**20
MAX_COMMAND_MAPS: Final = MAX_MAPS + 2 * MAX_BLOCKS
MAX_COMMAND_ARRAYS: Final = MAX_ARRAYS + 2 * MAX_BLOCKS
"""The same of a command to a worker: it has what a client's request has, and what the daemon adds, such as digests of
files. With the limits of a request, a client could end the workers by a request of just that size."""

MAX_RANK: Final = 8
"""Dimensions of one tensor."""

MAX_NAME_CHARS: Final = 512
"""Characters in a tensor name, a component label or a path."""

MAX_TEXT_CHARS: Final = 64 * 1024
"""Characters in an error detail; those of xditd are far shorter, since lists in them are cut to a few names."""

MAX_ERROR_NAMES: Final = 2_048
MAX_ERROR_NAME_CHARS: Final = 1_024
MAX_ERROR_NAMES_CHARS: Final = 256 * 1024
"""Names that an error carries beside its detail: entries, characters of one, and of all together."""

MAX_BYTES: Final = 2**46
"""Sizes and offsets (64 TiB)."""

MAX_SIDE_PIXELS: Final = 8_192
"""Height and width of an image, checked in the client and in the workers."""

MAX_FRAMES: Final = 1_025
"""Of one video."""

MAX_STEPS: Final = 1_000
MAX_BATCH: Final = 64
MAX_GUIDANCE: Final = 1_000.0

MAX_TEXT_LAYERS: Final = 16
"""Layers of a text encoder whose states one job gives."""
MAX_LAYER: Final = 1_024

MAX_TEXT_TOKENS: Final = 4_096
"""Tokens of one text: a text encoder's attention may store a number for every pair of tokens in every head."""

MAX_TOKENIZER_FILE_BYTES: Final = 64 * 2**20
MAX_TOKENIZER_BYTES: Final = 128 * 2**20
"""One file of a tokenizer, and all of them. Gemma's tokenizer.json, the largest that is known, takes 32 MiB."""

MAX_PROMPT_CHARS: Final = 32_768
MAX_PROMPTS_CHARS: Final = 524_288
"""Characters of one prompt, and of all in one request."""

MAX_PROMPT_IMAGES: Final = 16
"""Pictures that go with the prompts of one request."""

MAX_ROLES: Final = 8
"""Text encoders, or tokenizers, that one transformer's prompts need."""

MAX_IMAGE_ARGUMENTS: Final = 8
"""Tensors that describe the images of texts, of all images together."""

MAX_PARTS: Final = 64
"""Forwards in one call."""

MAX_ARGUMENTS: Final = 1_024
MAX_ARGUMENT_DEPTH: Final = 12
"""Of one forward: nodes of its argument tree, and levels."""

MAX_ARGUMENT_VALUES: Final = 4_096
"""Elements of a tensor inside a message."""

MAX_ARGUMENT_BYTES: Final = 4 * 2**30
"""Memory that the arguments of one job may take on each worker, concatenated tensors included. A video of 161 frames of
1280 x 720 takes 1.7 GiB in float32, and its mask 0.6 GiB."""

DEVICE_IO_FROM_BYTES: Final = 2**20
"""Tensors of a call that are on a GPU and at least this large stay on it, in a block of device memory. The workers read
smaller ones from host memory without a copy between two GPUs."""

MAX_DROPPED_BLOCKS: Final = 64
"""Blocks of device memory that one call asks the workers to unmap."""

MAX_SCHEDULE_SETTINGS: Final = 64
MAX_CONTROLS: Final = 16
"""ControlNets in one forward, or in one generation."""

MAX_CONTROL_MODES: Final = 1_024
"""Kinds of pictures that one ControlNet tells apart."""

MAX_CONTROLLED_BLOCKS: Final = 1_024
"""Blocks of a transformer that residuals are given to."""

MAX_LORAS: Final = 64
"""LoRAs of one component in one job."""

MAX_LORA_NAMES: Final = 64
"""Names that fit no layer, in the facts of a LoRA."""

MAX_FORESEEN: Final = 64
"""Arguments whose values in later calls a call announces."""

MAX_KEPT_TENSORS: Final = 256
"""Tensors of one client that a worker keeps for later requests; the least recently used is evicted."""

MAX_KEPT_BYTES: Final = 256 * 2**20
"""Bytes of all of them. One prompt of 512 tokens, 4,096 wide, takes 4 MiB in bfloat16."""

MAX_SAFETENSORS_HEADER_BYTES: Final = 32 * 2**20
"""Header of a safetensors file; the format itself allows 100 MB."""

MAX_GGUF_HEADER_BYTES: Final = MAX_SAFETENSORS_HEADER_BYTES
"""Header of a GGUF file, key-value pairs included. That of a diffusion model takes 0.1 MiB, that of a language model
with its vocabulary up to 20 MiB."""

MAX_GGUF_PAIRS: Final = 32_768
"""Key-value pairs: one for each reshaped tensor, and some more."""

MAX_GGUF_VALUES: Final = 2**20
"""Strings and arrays inside arrays, which are read one by one: about 1 s. Vocabularies have up to 800,000."""

MAX_GGUF_NESTING: Final = 4
"""Arrays in arrays. No known program writes any."""

MAX_LAST_ERRORS: Final = 16
"""Errors that the daemon keeps for ``status``."""

MAX_FUSED_CHECKS: Final = 32
"""Fast path checks (fused kernels against unmodified modules) in ``status``; there is one for each number of tokens."""

MAX_SPLIT_CHECKS: Final = 32
"""Checks of calls by rows and by tokens in ``status``: the newest."""

MAX_FORWARD_PATHS: Final = 32
"""Decisions on the paths of forwards in ``status``: the newest."""

MAX_PACKED_FORMATS: Final = 32
"""Formats of packed weights in one component, and in ``status``: more than there are."""

MAX_PACKED_REASONS: Final = 16
"""Reasons in ``status`` why weights of one format are not multiplied natively; the rarest are counted together."""

MAX_LAYOUT_CANDIDATES: Final = 64
"""Possible layouts of a group: 840 workers have 56, and no other number up to 1024 has more."""

MAX_LOG_LINES: Final = 2_000

SLOWEST_BYTES_PER_S: Final = 64 * 2**20
"""The slowest rate at which lent bytes are read: a file on a slow disk that is not in the page cache."""
