"""The job queue: jobs, fair queueing among clients, and the scheduler that runs jobs on the workers."""
