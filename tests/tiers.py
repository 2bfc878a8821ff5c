"""Which combinations of a slow test CI runs: those that differ most. The others are marked long, and run by hand (`make test-long`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_and_long(values: Iterable[Any], *slow: Any) -> list[Any]:
    """Parameters for ``parametrize``, in place of a mark of the whole test: ``slow`` ones, and the rest as long."""
    values = list(values)
    assert not {*slow} - {*values}
    return [pytest.param(value, marks=pytest.mark.slow if value in slow else pytest.mark.long) for value in values]
