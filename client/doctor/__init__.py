"""``xditd doctor``: checks of the host, the workers' libraries and the daemon, with remedies."""
