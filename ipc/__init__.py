"""What every room shares: messages, limits, error codes, addresses, and descriptions of lent bytes.

Nothing here imports torch. The byte transports, which do, live in :mod:`xditd.ipc.transports`.
"""
