"""The daemon: keeps the worker group alive, owns leases and the queue, and speaks with clients.

It holds no tensors and no CUDA context: torch is never imported here. ``python -m xditd.daemon`` starts it.
"""
