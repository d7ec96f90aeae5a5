"""A recorded run for every test that asks for one."""

from tests.run_lab import lab

__all__ = ["lab"]
