"""The daemon: keeps the worker group running, owns leases and the queue, and serves clients.

It never imports torch, so it has no tensors and no CUDA context. ``python -m xditd.daemon`` starts it.
"""
