"""Leases of lent components, and the commands with which the workers map and unmap them."""
