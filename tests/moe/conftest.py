"""FlashInfer's emulation for the tests that ask for it."""

from __future__ import annotations

import pytest

from tests.moe.libraries.flashinfer import Emulation


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, version: str) -> Emulation:
    return Emulation(version).install(monkeypatch)
