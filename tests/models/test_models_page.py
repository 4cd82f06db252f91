"""``docs/models.md`` is what its command writes."""

from __future__ import annotations

import pytest
import record_models


@pytest.mark.slow
def test_the_page_of_models_is_up_to_date() -> None:
    assert record_models.TARGET.read_text(encoding="utf-8") == record_models.render(), (
        "run python tests/models/support/record_models.py"
    )
