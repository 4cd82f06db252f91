"""The ``xditd`` command: one module a verb."""
