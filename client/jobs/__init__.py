"""A client's jobs, from the caller's arguments to the results. A module imports only modules further down this list:

- ``runner`` sends jobs, waits, and reads results;
- ``job_requests`` builds requests and assigns offsets in the block; ``generation`` is a running generation;
- ``checks`` validates arguments; ``arguments`` converts trees of tensors to messages and results back;
  ``pending`` is a job that was sent.
"""
