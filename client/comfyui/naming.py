"""Name functions and objects that nodes put into a model, for messages."""

from __future__ import annotations

import types


def name_of(thing: object) -> str:
    """Return ``CLASS of MODULE``: the node's class for a function that was defined in one of its methods."""
    if isinstance(thing, (types.FunctionType, types.MethodType, types.BuiltinFunctionType, type)):
        qualified, module = thing.__qualname__, thing.__module__ or ""
    else:
        inner = getattr(thing, "func", None) or getattr(thing, "_orig_mod", None)  # functools.partial, torch.compile
        if inner is not None and inner is not thing:
            return name_of(inner)
        qualified, module = type(thing).__qualname__, type(thing).__module__
    owner, _, _ = qualified.partition(".<locals>")
    head = owner.split(".")[0] if ".<locals>" in qualified else owner
    shown = module.rpartition("/")[2].rpartition(".")[2]
    return f"{head} of {shown}" if shown and shown != "builtins" else head
