"""Entries of the classes from A to Helios."""

from __future__ import annotations

from class_entry import ClassEntry

ENTRIES: tuple[ClassEntry, ...] = ()
