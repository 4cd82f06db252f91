"""Several hosts, on Ray: an agent on each host uses that host's daemon, and a router chooses the host of each job.

Only this folder imports ray, and nothing outside it imports this folder but the verb ``xditd cluster`` and
``Client(cluster=...)``, when they are used. Ray unpickles what its peers send and listens on every interface: here the
rules on pickle and listeners do not hold (docs/security.md). The code itself unpickles nothing: jobs, reports and
results are MessagePack (``messages.py``).
"""
