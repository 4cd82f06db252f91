"""Serve client requests: the service, the dispatch of requests, their handlers, and quotas."""
