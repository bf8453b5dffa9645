"""Compare mixers: recall, in-context regression, cost and accuracy, with controls, in one report.

The package can be called: `visionattn.arena(["hsa", "window"])`. Each task is a module, whose docstring states what it
measures and its source.
"""

from visionattn.lazy import make_callable

make_callable(__name__, "visionattn.arena.api")
