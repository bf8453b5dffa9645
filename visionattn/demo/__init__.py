"""A web page that runs the models of the zoo in the browser; calling the package calls the function `demo`.

The page is built from `web/` by `make web`, which writes it into the folder `page` next to this file.
"""

from visionattn.lazy import lazily, make_callable

make_callable(__name__, "visionattn.demo.server")

__all__ = ["DIGITS", "PAGE", "PageServer"]

_SERVER = "visionattn.demo.server"
__getattr__ = lazily(__name__, {"DIGITS": _SERVER, "PAGE": _SERVER, "PageServer": _SERVER})
