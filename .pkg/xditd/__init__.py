"""Warm multi-GPU xDiT workers behind a daemon, fed with weights that clients lend.

The rooms are ``xditd.client``, ``xditd.daemon``, ``xditd.gpu_workers`` and ``xditd.ipc``. This module imports
none of them: whoever imports one room pays for that room alone.
"""

__version__ = "0.1.0"
