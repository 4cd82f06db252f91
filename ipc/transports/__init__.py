"""Transports of tensor bytes between clients and workers: CUDA IPC, sealed shared memory, open files.

Only this package of :mod:`xditd.ipc` may import torch and cuda-bindings, inside functions.
"""
