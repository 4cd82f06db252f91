"""The processes of a worker group: the leader, its ranks, and the loop in which a rank runs the daemon's commands."""
