"""The ``xditd`` command: one module for each subcommand ("verb")."""
