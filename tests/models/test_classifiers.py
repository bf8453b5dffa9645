"""Every classifier of the zoo under the shared contract."""

from tests.models.contract import TestEveryName, TestSmallestNames  # noqa: F401
