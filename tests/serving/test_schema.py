"""Whatever the schema allows, and much that it does not, is answered without a failure of the server's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from served import serving

from runtimes.artifacts.bundle import Bundle
from runtimes.serving.settings import ServeSettings

ADMIN = "adm"
HEADERS = {"Authorization": f"Bearer {ADMIN}"}


@pytest.mark.slow
def test_nothing_that_is_asked_breaks_it(bundle: Bundle, tmp_path: Path) -> None:
    import schemathesis  # seconds

    with serving(bundle, ServeSettings(adapters=tmp_path, admin_token=ADMIN)) as served:
        schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        operations = [each.ok() for each in schema.get_all_operations()]
        answered: dict[str, set[int]] = {operation.label: set() for operation in operations}

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
        def ask(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "all"  # of random names there are no models
            answer = case.call(headers=HEADERS, timeout=30)
            answered[case.operation.label].add(answer.status_code)
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        for operation in operations:
            given(case=operation.as_strategy())(ask)()
    assert len(operations) == 11
    assert 200 in answered["POST /v1/completions"] | answered["POST /v1/chat/completions"]
    assert not any('"error": "' in line for line in served.lines)
