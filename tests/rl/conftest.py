"""One thread, as for other small models."""

from tests.exchange import folders, greedy
from tests.models.conftest import _one_thread

__all__ = ["_one_thread", "folders", "greedy"]
