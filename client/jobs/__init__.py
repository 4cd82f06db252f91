"""Jobs of a client: arguments and checks of what is handed in, drafts, and jobs under way. Imports point down:

``running`` sends drafts, ``generation`` is a job that is watched, ``drafts`` lay out, ``pending`` is what was sent,
``checks`` refuse, ``arguments`` turn trees of tensors to what crosses and back.
"""
