"""Jobs of a client, from what a caller hands in to what it gets back. Imports point down this list:

- ``runner`` sends jobs, waits, and reads results;
- ``job_requests`` lay out a request and its block; ``generation`` is a generation under way;
- ``checks`` refuse what no job can use; ``arguments`` turn trees of tensors to what crosses, and results back;
  ``pending`` is a job that was sent.
"""
