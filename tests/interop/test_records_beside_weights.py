"""What a foreign adapter's files say of its tensors is compared with them: a contradiction is refused, and nothing is dropped unseen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import BASE, FIXTURES
from test_refusals import BIN, CONSREFT, HUB, HUB_NOREFT, LOREFT, SAID, at, damaged, edit_json, edit_state, refused

from reft_export.importing.foreign import Request
from reft_export.importing.importer import import_adapter
from runtimes.edits.adapter import Adapter

CLASSIFIER = FIXTURES / "classifiers" / "base-roberta-tiny"
FLEXIBLE = FIXTURES / "classifiers" / "flexible" / "adapter"
CONFIG, HUB_CONFIG, HEAD_CONFIG, SIDE = "config.json", "adapter_config.json", "head_config.json", "reft_export.json"


def imported(source: Path, output: Path, request: Request, model: Path = BASE) -> Adapter:
    return import_adapter(source, str(model), output, request, report=lambda _: None).adapter


def hub(without: tuple[str, ...] = (), **changes: object) -> Callable[[Path], None]:
    """Changes the keys of the ReFT config, and removes those of ``without``."""

    def change(folder: Path) -> None:
        content = json.loads((folder / HUB_CONFIG).read_text())
        content["config"] = {name: value for name, value in content["config"].items() if name not in without} | changes
        (folder / HUB_CONFIG).write_text(json.dumps(content))

    return change


def written(name: str, text: str, encoding: str = "utf-8") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text, encoding=encoding) and None


@pytest.mark.parametrize(
    ("source", "subtracts", "method", "was"), [(HUB, False, "direft", "loreft"), (HUB_NOREFT, True, "noreft", "noreft")]
)
def test_subtract_projection_tells_the_method(source, subtracts, method, was, tmp_path) -> None:
    copy = damaged(tmp_path, source, hub(subtract_projection=subtracts))
    found, plain = imported(copy, tmp_path / "found", Request()), imported(source, tmp_path / "plain", Request(method=was))
    assert (found.method, plain.method) == (method, was)
    if method == "direft":  # the same projection and source, and no "- P h"
        assert {name.rpartition(".")[2] for name in found.tensors} == {"W1", "W2", "b"}
        for name, value in found.tensors.items():
            place, _, parameter = name.rpartition(".")
            np.testing.assert_array_equal(value, plain.tensors[f"{place}.{ {'W1': 'W', 'W2': 'R', 'b': 'b'}[parameter] }"])
    for other in {"loreft", "noreft", "direft"} - {method}:
        refused(copy, tmp_path / "out", Request(method=other), f"--method {other} contradicts.* subtract_projection {subtracts}: {method}$")


def test_keys_of_other_versions_of_adapters(tmp_path) -> None:
    """1.0 has neither dtype nor init_weights_seed."""
    copy = damaged(tmp_path, HUB, hub(without=("dtype", "init_weights_seed"), version="1.0.0"))
    assert imported(copy, tmp_path / "out", Request()).method == "loreft"


def two_units(folder: Path) -> None:
    edit_state("pytorch_adapter.bin", lambda s: s | {name.replace("units.0", "units.1"): value for name, value in s.items()})(folder)


@pytest.mark.parametrize(
    ("source", "change", "match"),
    [
        (HUB, hub(subtract_projection="no"), "subtract_projection is 'no', expected bool"),
        (HUB, hub(r=9), r"r is 9, expected 4, the rank of learned_source.weight \[4, 64\] in layer 1, unit 0; the adapter is damaged"),
        (HUB, hub(scaling=2.0, r=4), "adapter_config.json: scaling is none of the keys of a ReftConfig"),
        (HUB, two_units, "tied_weights is True, but layer 1 has a second unit; the adapter is damaged"),
        (
            LOREFT,
            edit_json(CONFIG, representations=[[n, "block_output", "pos", 1, 99] for n in (1, 2)]),
            "low_rank_dimension of layer_1_comp_block_output_unit_pos_nunit_1#0 is 99, expected 4, .* damaged",
        ),
        (CONSREFT, edit_json(CONFIG, representations=[[n, "block_output", "pos", 1, 99] for n in (1, 2)]), "is 99, expected 3, .* damaged"),
        (
            LOREFT,
            edit_json(CONFIG, intervention_dimensions=[64, 128]),
            "intervention_dimensions of layer_2_.* is 128, expected 64, .* damaged",
        ),
        (LOREFT, edit_json(CONFIG, intervention_dimensions=[64]), "1 intervention_dimensions for 2 interventions; it is damaged"),
        (LOREFT, lambda f: shutil.copy(f / BIN, f / BIN.replace("_1_", "_3_", 1)), "does not list intkey_layer_3_comp_block_output"),
        (LOREFT, edit_state(BIN, lambda s: at(s, "weight", torch.zeros(64))), r"weight has shape \[64\], expected \[r, D\]"),
        (LOREFT, written(SIDE, '{"positions": 5}'), "reft_export.json: positions is 5, expected str"),
        (LOREFT, written(SIDE, '{"act_fn": 5}'), "reft_export.json: act_fn is 5, expected str"),
        (LOREFT, written(SIDE, '{"share_weights": "false"}'), "reft_export.json: share_weights is 'false', expected bool"),
        (LOREFT, written(SIDE, '{"share_weights": null}'), "reft_export.json: share_weights is None, expected bool"),
        (LOREFT, written(SIDE, "[" * 100_000), "reft_export.json is not JSON: it is nested too deeply"),
    ],
)
def test_records_that_contradict_the_tensors(source, change, match, tmp_path) -> None:
    copy = damaged(tmp_path, source, change)
    refused(copy, tmp_path / "out", Request() if source == HUB else SAID, match)


def test_records_that_say_nothing(tmp_path) -> None:
    """pyreft 0.0.1's README gives the rank to the intervention alone, and old versions of pyvene record no dimensions for Loreft."""
    silent = edit_json(CONFIG, representations=[[n, "block_output", "pos", 1, None] for n in (1, 2)], intervention_dimensions=[None, None])
    assert imported(damaged(tmp_path, LOREFT, silent), tmp_path / "out", SAID).rank == 4


def test_a_byte_order_mark(tmp_path) -> None:
    copy = damaged(tmp_path, LOREFT, written(SIDE, '{"positions": "f2+l2", "share_weights": true, "act_fn": "none"}', "utf-8-sig"))
    written(CONFIG, (copy / CONFIG).read_text(), "utf-8-sig")(copy)
    assert imported(copy, tmp_path / "one", Request()).method == "loreft"
    shutil.rmtree(copy)
    copy = damaged(tmp_path, FLEXIBLE, lambda _: None)
    for name in (HUB_CONFIG, HEAD_CONFIG):
        written(name, (copy / name).read_text(), "utf-8-sig")(copy)
    assert imported(copy, tmp_path / "two", Request(), CLASSIFIER).head


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"config": "x"}', "config is 'x', expected an object or null"),
        ('{"config": [1]}', r"config is \[1\], expected an object or null"),
        ('{"label2id": ["sad", "calm"]}', r"label2id is \['sad', 'calm'\], expected a number for each label, or null"),
        ('{"label2id": {"sad": "0", "calm": 1}}', "label2id is .*'0', 'calm': 1}, expected a number for each label"),
        ('{"config": {"label2id": {"sad": 0, "calm": null}}}', "config.label2id is .*None}, expected a number for each label"),
        ('{"label2id": {"sad": 0, "calm": true}}', "label2id is .*True}, expected a number for each label"),
        ("[1]", "head_config.json holds a JSON list, expected an object"),
        ("[" * 100_000, "head_config.json is not JSON: it is nested too deeply"),
    ],
)
def test_refused_head_configs(text, match, tmp_path) -> None:
    copy = damaged(tmp_path, FLEXIBLE, written(HEAD_CONFIG, text))
    refused(copy, tmp_path / "out", Request(), match, model=CLASSIFIER)


def test_one_head_of_several(tmp_path) -> None:
    """The one that bears the adapter's name, case; without one, none is chosen."""
    head = "pytorch_model_head.bin"
    expected = imported(FLEXIBLE, tmp_path / "expected", Request(), CLASSIFIER).head
    more = edit_state(head, lambda s: s | {name.replace("case", "other"): value + 1 for name, value in s.items()})
    copy = damaged(tmp_path, FLEXIBLE, more)
    found = imported(copy, tmp_path / "found", Request(), CLASSIFIER).head
    assert found.keys() == expected.keys() and all((found[name] == value).all() for name, value in expected.items())
    edit_state(head, lambda s: {name.replace("case", "third"): value for name, value in s.items()})(copy)
    refused(copy, tmp_path / "out", Request(), r"holds 2 heads \(other, third\), none of them named case", model=CLASSIFIER)
