"""The memory that lent weights lie in, as this rank maps it."""
