"""Lazy tensors: what they are, and the operations on them."""
