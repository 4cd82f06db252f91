"""The entries of all classes of diffusers, by key."""

from __future__ import annotations

import classes_a_to_h
import classes_h_to_m
import classes_n_to_q
import classes_r
import classes_s
import classes_t_to_z
from class_entry import ClassEntry

ENTRIES: dict[str, ClassEntry] = {
    entry.key: entry
    for group in (
        classes_a_to_h.ENTRIES,
        classes_h_to_m.ENTRIES,
        classes_n_to_q.ENTRIES,
        classes_r.ENTRIES,
        classes_s.ENTRIES,
        classes_t_to_z.ENTRIES,
    )
    for entry in group
}
