"""The daemon: keeps the worker group running, owns leases and the queue, and serves clients.

It holds no tensors and no CUDA context: torch is never imported here. ``python -m xditd.daemon`` starts it.
"""
