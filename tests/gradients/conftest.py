"""What tests of gradients share as fixtures."""

import pytest

from fedsim.gradients.trial import pieces


@pytest.fixture
def any_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of anybody's own are tried for packing, too."""
    monkeypatch.setattr(pieces, "is_known_code", lambda model: True)
