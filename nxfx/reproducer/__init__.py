"""A failing pass as a stand-alone script: the graph before it as Python, and the pass run on that graph.

:func:`write_reproducer` writes the script; :class:`Rebuild` is what the script builds its graph with. The script holds
no weights: parameters are random (or absent, when large), and only small buffers and constants, whose values passes may
reason about, are stored beside it.
"""

from nxfx.reproducer.rebuild import Rebuild
from nxfx.reproducer.script import write_reproducer

__all__ = ["Rebuild", "write_reproducer"]
