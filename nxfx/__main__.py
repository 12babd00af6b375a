"""``python -m nxfx``."""

from nxfx.cli import main

main()
