"""Mixers side by side: recall, in-context regression, cost and accuracy, with controls, in one report.

The package is called as the function of its name: `visionattn.arena(["hsa", "window"])`. A task is a module: what it
measures, and its source, stand at its top.
"""

from visionattn.lazy import make_callable

make_callable(__name__, "visionattn.arena.api")
