"""The entries of all classes of diffusers, by class and variant."""

from __future__ import annotations

import classes_a_to_b
import classes_c
import classes_d_to_h
import classes_h_to_k
import classes_l_to_m
import classes_n_to_q
import classes_r
import classes_s
import classes_t_to_z
from class_entry import ClassEntry

_MODULES = (
    classes_a_to_b,
    classes_c,
    classes_d_to_h,
    classes_h_to_k,
    classes_l_to_m,
    classes_n_to_q,
    classes_r,
    classes_s,
    classes_t_to_z,
)

ENTRIES: dict[str, ClassEntry] = {entry.key: entry for module in _MODULES for entry in module.ENTRIES}
