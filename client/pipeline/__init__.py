"""``Pipeline``: from words to pictures and videos, over ``Client``.

``pipeline.py`` has the class; ``sources.py``, ``folders.py`` and ``files.py`` find its parts; ``loading.py`` lends
them; ``calls.py`` checks the arguments of a call, and ``families.py`` says what each model makes of them.
"""
