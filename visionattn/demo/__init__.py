"""The models of the zoo on a page, computed by the browser itself; the package is called as the function of its name.

The page is built from `web/` by `make web`, which puts it into the folder `page` beside this file.
"""

from visionattn.lazy import lazily, make_callable

make_callable(__name__, "visionattn.demo.server")

__all__ = ["DIGITS", "PAGE", "PageServer"]

_SERVER = "visionattn.demo.server"
__getattr__ = lazily(__name__, {"DIGITS": _SERVER, "PAGE": _SERVER, "PageServer": _SERVER})
