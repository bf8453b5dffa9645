"""The one error of this package."""

__all__ = ["RunError", "short"]


class RunError(ValueError):
    """A file or an image that is not accepted: what was given, what is accepted, what to do, on one line."""


def short(value: object, width: int = 200) -> str:
    """A value as messages echo it: on one line, cut where it is long."""
    text = "".join(c if c.isprintable() else " " for c in " ".join(str(value).split()))
    return text if len(text) <= width else f"{text[: width - 4]} ..."
