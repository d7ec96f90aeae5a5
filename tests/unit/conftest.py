"""What unit tests share: models of a few tensors, whose architecture nobody builds."""

from __future__ import annotations

import pytest

from flashrl_cli.weights import accounting


@pytest.fixture(autouse=True)
def no_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers is not imported, and no folder is compared with what its config asks for; a test may say what that
    is.
    """
    monkeypatch.setattr(accounting, "_of_config", lambda text: None)
