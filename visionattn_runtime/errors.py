"""The error class of this package."""

__all__ = ["RunError", "short"]


class RunError(ValueError):
    """A file or an image is not accepted; the message is one line: what was given, what is accepted, what to do."""


def short(value: object, width: int = 200) -> str:
    """Format a value for a message: on one line, truncated to `width` characters."""
    text = "".join(c if c.isprintable() else " " for c in " ".join(str(value).split()))
    return text if len(text) <= width else f"{text[: width - 4]} ..."
