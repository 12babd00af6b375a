"""Branches on tensors: the traces of both sides, and one graph made of them."""
