"""The entries of all classes of diffusers, by name."""

from __future__ import annotations

import classes_a_to_h
import classes_h_to_k
import classes_l_to_m
import classes_n_to_z
from class_entry import ClassEntry

ENTRIES: dict[str, ClassEntry] = {
    entry.name: entry
    for group in (
        classes_a_to_h.ENTRIES,
        classes_h_to_k.ENTRIES,
        classes_l_to_m.ENTRIES,
        classes_n_to_z.ENTRIES,
    )
    for entry in group
}
