"""Code shared by daemon, workers and clients: messages, limits, errors, settings, descriptions of lent bytes.

Only :mod:`xditd.ipc.transports` imports torch.
"""
