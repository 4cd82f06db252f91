"""One module for each kind of request. A handler answers at once, or returns ``None`` and the answer comes later."""
