"""The ``nxfx`` command."""

from nxfx.cli.app import app, main

__all__ = ["app", "main"]
