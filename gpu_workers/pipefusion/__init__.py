"""PipeFusion: a transformer's blocks are dealt to the ranks as stages, which work on different patches at once.

Each stage attends with keys and values of the whole image, those of other patches as they were a moment ago. The
method and its process groups are xDiT's; ``docs/decisions`` says why the loop is our own.

Source: "PipeFusion: Patch-level Pipeline Parallelism for Diffusion Transformers Inference", arXiv:2405.14430.
"""
