"""The toys' files, of the runner's tests."""

from tests.runtime.conftest import files  # noqa: F401
