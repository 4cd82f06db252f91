"""Helpers for callers of a model family's class. Only the demo and the node pack import them: the library passes the
arguments of calls on unchanged.
"""
