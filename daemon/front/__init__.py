"""What clients ask for: each request to its handler, and the parts that serve it put together."""
