"""Which tokens an adapter edits, as a request that asks is told."""

from __future__ import annotations

from typing import Any

import pytest
from served import TEMPLATE, Served, serving
from toy_bundle import ADAPTERS

from runtimes.artifacts.bundle import Bundle
from runtimes.edits.adapter import save_adapter
from runtimes.serving.settings import ServeSettings

MESSAGES = [{"role": "user", "content": "The fox"}]
OWN = {"reft": {"edited_tokens": True}}
TOKENS = ["u", "s", "er", ":", " ", "The", " fox", " "]
EDITED = {
    "base": ([], False),
    "ends": ([0, 1, 6, 7], False),
    "prompt": (list(range(8)), False),
    "all": (list(range(8)), True),
}


@pytest.mark.parametrize("model", EDITED)
def test_a_chat_says_which_of_its_tokens_are_edited(served: Served, model: str) -> None:
    assert "".join(TOKENS) == "user: The fox " and "{{ m.role }}: {{ m.content }} " in TEMPLATE
    ask: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 3, "temperature": 0}
    create = served.client().chat.completions.create
    answer = create(**ask, n=2, extra_body=OWN)
    (told,) = answer.reft["edited_tokens"]
    edited, completion = EDITED[model]
    assert [each["token"] for each in told["prompt"]] == TOKENS
    assert [i for i, each in enumerate(told["prompt"]) if each["edited"]] == edited and told["completion"] is completion
    first, *rest = create(**ask, stream=True, extra_body=OWN)
    assert first.reft["edited_tokens"] == [told] and not first.choices
    assert rest[0].choices[0].delta.role == "assistant" and not any(hasattr(chunk, "reft") for chunk in rest)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == answer.choices[0].message.content
    for own in ({}, {"reft": {}}, {"reft": {"edited_tokens": False}}):
        assert not hasattr(create(**ask, extra_body=own), "reft")


def test_every_prompt_of_a_completion_and_no_edit_at_strength_0(served: Served) -> None:
    create = served.client().completions.create
    ask: dict[str, Any] = {"model": "all", "prompt": ["Hi", "The fox"], "max_tokens": 2}
    told = create(**ask, extra_body=OWN).reft["edited_tokens"]
    assert ["".join(each["token"] for each in one["prompt"]) for one in told] == ["Hi", "The fox"]
    assert next(iter(create(**ask, stream=True, extra_body=OWN))).reft["edited_tokens"] == told
    told = create(**ask, extra_body={**OWN, "strength": 0}).reft["edited_tokens"]
    assert not any(each["edited"] for one in told for each in one["prompt"]) and not any(one["completion"] for one in told)


def test_of_an_adapter_that_is_replaced_the_new_one(bundle: Bundle, tmp_path: Any) -> None:
    home = tmp_path / "home"
    for folder, name in ((home / "own", "ends"), (tmp_path / "new", "all")):
        save_adapter(ADAPTERS[name], folder)
    with serving(bundle, ServeSettings(adapters=home, admin_token="adm")) as each:
        ask: dict[str, Any] = {"model": "own", "prompt": "The fox", "max_tokens": 1, "extra_body": OWN}
        create = each.client("adm").completions.create
        assert create(**ask).reft["edited_tokens"][0]["completion"] is False
        files = {name: (tmp_path / "new" / name).read_bytes() for name in ("adapter.json", "adapter.safetensors")}
        assert each.http("adm").put("/v1/adapters/own?replace=true", files=files).status_code == 200
        assert create(**ask).reft["edited_tokens"][0]["completion"] is True
