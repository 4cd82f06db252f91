"""What programs on the client's side need to know of a model family to call its class; the library itself needs none.

The demo and the node pack import it. Nothing else does: arguments of calls pass through the library as they are.
"""
