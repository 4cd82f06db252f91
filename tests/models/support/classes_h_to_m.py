"""Entries of the classes from HiDream to Motif."""

from __future__ import annotations

from class_entry import ClassEntry

ENTRIES: tuple[ClassEntry, ...] = ()
