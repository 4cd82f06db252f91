"""The byte transports that clients and workers share: CUDA IPC, sealed shared memory, open files.

Only this package of :mod:`xditd.ipc` may import torch and cuda-bindings, and it does so when a
transport is used, not when it is imported.
"""
