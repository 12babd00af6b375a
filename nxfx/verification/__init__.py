"""Checking that a candidate computes what the model computes."""
