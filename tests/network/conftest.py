"""What the tests of the network share."""

from __future__ import annotations

import pytest

from ..models import shared


@pytest.fixture(params=["linear-000", "linear-111", "mlp-000", "mlp-111"])
def model(request):
    """Tests do not change it."""
    return shared(*request.param.split("-"))
