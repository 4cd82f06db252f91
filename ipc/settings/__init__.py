"""Settings: every default, bound, unit, help text, flag and environment variable.

``daemon`` has the settings of the daemon and the workers, ``client`` the flags of the other verbs, ``setting`` reads
flag, variable, file key and checks from a field's annotations.
"""
