"""The entries of all classes of diffusers, by key."""

from __future__ import annotations

import classes_a_to_b
import classes_c
import classes_d_to_h
import classes_h_to_m
import classes_n_to_z
from class_entry import ClassEntry

ENTRIES: dict[str, ClassEntry] = {
    entry.key: entry
    for module in (classes_a_to_b, classes_c, classes_d_to_h, classes_h_to_m, classes_n_to_z)
    for entry in module.ENTRIES
}
