"""Models assert as tests do: their failures shall show values too."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.laws.limits_claims", "tests.laws.limits_machine", "tests.laws.histories_machine")
