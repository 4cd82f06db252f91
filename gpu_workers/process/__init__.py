"""What starts and ends processes: the leader, its ranks, and the loop in which a rank does what the daemon says."""
