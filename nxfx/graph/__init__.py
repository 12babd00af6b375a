"""The only place that creates and inspects nodes. Imports nothing of nxfx above it."""
