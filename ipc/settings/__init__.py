"""Settings: every default, bound, unit, help text, flag and environment variable, in one place.

``daemon`` holds the daemon's settings and the options of the workers, ``client`` the flags of the other verbs,
``setting`` what parsers, readers of files and documents derive from their fields.
"""
