"""Mapping of lent memory into a rank."""
