"""What cannot be imported is refused in one line, before anything is written; an output that exists stays as it is."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from cases import BASE, FIXTURES
from safetensors.torch import load_file, save_file

from reft_export.importing.foreign import Request
from reft_export.importing.importer import import_adapter
from runtimes.edits.adapter import load_adapter
from runtimes.errors import ReftError

LOREFT = FIXTURES / "pyreft" / "a_loreft_tied_r4_f2l2" / "adapter"
NOREFT = FIXTURES / "pyreft" / "d_noreft_tied_r4_f2l2_bias" / "adapter"
CONSREFT = FIXTURES / "pyreft-generated" / "consreft" / "adapter"
HUB = FIXTURES / "adapterhub" / "aa_loreft_tied_p2s2" / "adapter"
HUB_NOREFT = FIXTURES / "adapterhub-generated" / "noreft_tied_all" / "adapter"
HUB_HEAD = FIXTURES / "adapterhub-generated" / "loreft_untied" / "adapter"
SAID = Request(positions="f2+l2", tied=True, activation="none")
BIN = "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"


class Hostile:
    """A pickle that would write a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def refused(source: Path, output: Path, request: Request, match: str, *, code: int = 2, model: Path = BASE, **options: object) -> None:
    before = sorted(output.parent.iterdir())
    with pytest.raises(ReftError, match=match) as e:
        import_adapter(source, str(model), output, request, report=lambda _: None, **options)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600, str(e.value)
    assert e.value.exit_code == code
    assert sorted(output.parent.iterdir()) == before


def damaged(tmp_path: Path, source: Path, change: Callable[[Path], None]) -> Path:
    copy = tmp_path / "foreign"
    shutil.copytree(source, copy)
    change(copy)
    return copy


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        target = content["config"] if "config" in content and changes.keys() & content["config"].keys() else content
        target.update(changes)
        (folder / name).write_text(json.dumps(content))

    return change


def edit_state(name: str, edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = torch.load(folder / name, weights_only=True)
        state = edit(state) or state
        torch.save(state, folder / name)

    return change


def at(state: dict, key: str, value: object) -> dict:
    return {**state, key: value}


@pytest.mark.parametrize(
    ("source", "missing", "names"),
    [
        (LOREFT, ("positions", "tied", "activation"), ["--positions", "--tied or --untied", "--activation"]),
        (LOREFT, ("positions",), ["--positions (f2+l2, f3, l1, prompt, all)"]),
        (LOREFT, ("tied",), ["share_weights", "--tied or --untied"]),
        (LOREFT, ("activation",), ["act_fn", "--activation (none, relu, gelu"]),
        (CONSREFT, ("positions", "tied", "activation"), ["--positions", "--tied or --untied"]),
        (HUB_NOREFT, ("positions", "tied", "activation", "method"), ["--method noreft (it is) or --method direft (it is not)"]),
    ],
)
def test_what_is_not_recorded_is_asked_for(source, missing, names, tmp_path) -> None:
    request = replace(SAID, **dict.fromkeys(missing))
    with pytest.raises(ReftError, match="does not record") as e:
        import_adapter(source, str(BASE), tmp_path / "out", request, report=lambda _: None)
    assert all(name in str(e.value) for name in names), str(e.value)
    for flag in ("--positions", "--tied", "--activation", "--method"):
        assert (flag in str(e.value)) == any(flag in name for name in names)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "request_", "match"),
    [
        (LOREFT, replace(SAID, positions="g3"), "positions 'g3' are not understood"),
        (LOREFT, replace(SAID, activation="swoosh"), "--activation 'swoosh' is unknown; known: none, relu"),
        (LOREFT, replace(SAID, method="noreft"), "--method noreft contradicts the file.*LoreftIntervention"),
        (LOREFT, replace(SAID, method="magic"), "--method 'magic' is unknown"),
        (LOREFT, replace(SAID, scale=2.0), "--scale does not apply to pyreft"),
        (LOREFT, replace(SAID, layers="1"), "--layers does not apply to pyreft"),
        (CONSREFT, replace(SAID, activation="gelu"), "--activation gelu does not apply: consreft has no learned source"),
        (HUB, replace(SAID, positions="f3"), "--positions f3 contradicts the adapter, which records f2.l2"),
        (HUB, replace(SAID, tied=False), "--untied contradicts the adapter, which records tied_weights True"),
        (HUB, replace(SAID, activation="gelu"), "--activation gelu contradicts the adapter, which records none"),
        (HUB, replace(SAID, method="noreft"), "--method noreft contradicts the adapter, which records orthogonality True"),
    ],
)
def test_flags_that_do_not_fit(source, request_, match, tmp_path) -> None:
    refused(source, tmp_path / "out", request_, match)


def not_loaded(folder: Path) -> None:
    torch.save({"weight": Hostile(folder.parent / "written")}, folder / BIN)


CONFIG, HUB_CONFIG, HUB_BIN, HUB_HEAD_BIN = "config.json", "adapter_config.json", "pytorch_adapter.bin", "pytorch_model_head.bin"
SOURCE = "model.layers.1.reft_layer.refts.reft.units.0.learned_source"


@pytest.mark.parametrize(
    ("source", "change", "match"),
    [
        (LOREFT, not_loaded, "its pickle asks for code to be run"),
        (LOREFT, lambda f: (f / BIN).write_bytes((f / BIN).read_bytes()[:900]), "is damaged, or holds more than weights"),
        (LOREFT, lambda f: (f / BIN).write_bytes(b""), "is damaged, or holds more than weights"),
        (LOREFT, lambda f: (f / BIN).unlink(), "#0.bin is missing; the adapter is incomplete"),
        (LOREFT, lambda f: torch.save([1, 2], f / BIN), "holds a list, expected a state dict"),
        (LOREFT, lambda f: torch.save({"weight": "x"}, f / BIN), "weight is not a tensor"),
        (LOREFT, edit_state(BIN, lambda s: at(s, "weight", s["weight"] * float("nan"))), "weight holds values that are not finite"),
        (LOREFT, edit_state(BIN, lambda s: at(s, "weight", s["weight"][:, :32].clone())), "rotate_layer is .64, 4., expected .32, 4."),
        (LOREFT, edit_state(BIN, lambda s: at(s, "rotate_layer", s["rotate_layer"].T.clone())), "rotate_layer is .4, 64., expected"),
        (LOREFT, edit_state(BIN, lambda s: at(s, "bias", torch.zeros(5))), "bias has shape .5., expected .4."),
        (LOREFT, edit_state(BIN, lambda s: at(s, "weight", torch.zeros(1).expand(10**6, 10**7))), "claims shape .1000000, 10000000."),
        (LOREFT, edit_state(BIN, lambda s: at(s, "weight", s["weight"].to_sparse())), "a float tensor is expected"),
        (LOREFT, edit_state(BIN, lambda s: at(s, "weight", torch.nested.nested_tensor([s["weight"]]))), "weight is a nested tensor"),
        (LOREFT, edit_state(BIN, lambda s: at(s, "weight", s["weight"].int())), "is torch.int32"),
        (LOREFT, edit_state(BIN, lambda s: at(s, "more", s["weight"])), "holds more, which this class does not have"),
        (LOREFT, edit_state(BIN, lambda s: {"bias": s["bias"]}), "lacks learned_source.weight"),
        (LOREFT, lambda f: (f / CONFIG).write_text("{"), "config.json is not JSON"),
        (LOREFT, edit_json(CONFIG, mode="serial"), "mode 'serial'"),
        (LOREFT, edit_json(CONFIG, representations=[]), "are not two lists of one length"),
        (LOREFT, edit_json(CONFIG, representations=[[9, "block_output", "pos", 1]] * 2), "layer 9 does not exist in this base .4 layers"),
        (
            LOREFT,
            edit_json(CONFIG, representations=["RepresentationConfig(layer=1)"] * 2),
            "is text, .* move config.json away, and the places",
        ),
        (LOREFT, edit_json(CONFIG, representations=[[-1, "block_output", "pos", 1]] * 2), "layer -1 of component block_output"),
        (LOREFT, edit_json(CONFIG, representations=[[1, "query_output", "pos", 1]] * 2), "component 'query_output' is not a stream"),
        (LOREFT, edit_json(CONFIG, representations=[[1, "block_output", "h.pos", 1]] * 2), "unit 'h.pos'"),
        (LOREFT, edit_json(CONFIG, representations=[[1, "block_output", "pos", 2]] * 2), "unit 'pos' x 2"),
        (LOREFT, edit_json(CONFIG, representations=[[0, "model.layers[7].output", "pos", 1]] * 2), "layer 7 does not exist"),
        (LOREFT, edit_json(CONFIG, representations=[[0, "model.norm.output", "pos", 1]] * 2), "'model.norm.output' is not a stream"),
        (LOREFT, edit_json(CONFIG, intervention_types=["<class '__main__.LoreftIntervention'>"] * 2), "__main__.LoreftIntervention is not"),
        (LOREFT, edit_json(CONFIG, intervention_types=["<class 'x.RedIntervention'>"] * 2), "is RED, which pyreft itself does not"),
        (HUB, lambda f: (f / HUB_BIN).unlink(), "pytorch_adapter.bin is missing"),
        (HUB, edit_json(HUB_CONFIG, layers=[1, 3]), "config names layers .1, 3., its tensors .1, 2."),
        (HUB, edit_json(HUB_CONFIG, layers="all"), "edits layers 1 to 2, base-llama-tiny has 4"),
        (HUB, edit_json(HUB_CONFIG, architecture="lora"), "architecture 'lora' is not reft"),
        (HUB, edit_json(HUB_CONFIG, prefix_positions=True), "prefix_positions is True, expected int"),
        (HUB, edit_json(HUB_CONFIG, prefix_positions=0, suffix_positions=0), "this adapter edits nothing"),
        (HUB, edit_json(HUB_CONFIG, non_linearity="leakyrelu"), "non_linearity 'leakyrelu' is unknown"),
        (HUB, edit_json(HUB_CONFIG, hidden_size=128), "trained on base-llama-tiny of width 128, base-llama-tiny has width 64"),
        (HUB, edit_json(HUB_CONFIG, model_type="bert"), "a bert; base-llama-tiny is a llama"),
        (HUB, edit_json(HUB_CONFIG, orthogonality=False), "--method noreft"),
        (HUB, edit_json(HUB_CONFIG, tied_weights=False), r"layer 1, unit 1 holds \[\]"),
        (HUB, edit_state(HUB_BIN, lambda s: at(s, "model.layers.1.lora_A", s[f"{SOURCE}.bias"])), "lora_A, which is no part of a ReFT"),
        (HUB, edit_state(HUB_BIN, lambda s: at(s, f"{SOURCE}.bias", s[f"{SOURCE}.bias"] / 0)), "bias holds values that are not finite"),
        (HUB_HEAD, edit_state("pytorch_model_head.bin", lambda s: {n: v + 1 for n, v in s.items()}), "lm_head.weight differs from"),
        (HUB_HEAD, edit_state(HUB_HEAD_BIN, lambda s: {"heads.reft.0.weight": s["lm_head.weight"] + 1}), "reft.0.weight differs from"),
        (HUB_HEAD, edit_state(HUB_HEAD_BIN, lambda s: {"heads.reft.1.bias": torch.zeros(64)}), "heads.reft.1.bias differs from"),
        (HUB_HEAD, edit_state(HUB_HEAD_BIN, lambda s: {n: v.to_sparse() for n, v in s.items()}), "lm_head.weight differs from"),
    ],
)
def test_damaged_and_hostile_adapters(source, change, match, tmp_path) -> None:
    copy = damaged(tmp_path, source, change)
    request = Request() if source in (HUB, HUB_HEAD) else SAID
    refused(copy, tmp_path / "out", request, match)
    assert not (tmp_path / "written").exists(), "the pickle's code ran"


def _renamed(folder: Path) -> None:
    """The file names of pyvene up to 0.1.6."""
    for layer, component, *_ in json.loads((folder / CONFIG).read_text())["representations"]:
        place = f"comp.{component}" if "." in component else f"layer.{layer}.comp.{component}"
        for path in folder.glob(f"intkey_{glob.escape(place.replace('.', '_'))}_unit_pos_nunit_1#*.bin"):
            path.rename(folder / f"intkey_{place}.unit.pos.nunit.1#{path.stem.rpartition('#')[2]}.bin")


def _indexed(folder: Path) -> None:
    """``model.layers.1.output`` for ``model.layers[1].output``, which pyvene resolves as well; in config.json and the file names."""
    content = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(re.sub(r"\[(\d)\]", r".\1", content))
    for path in folder.glob("intkey_*.bin"):
        path.rename(folder / re.sub(r"\[(\d)\]", r"_\1", path.name))


PATHS = FIXTURES / "pyreft-generated" / "loreft_paths" / "adapter"


@pytest.mark.parametrize("bare", [False, True], ids=["saved", "checkpoint"])
@pytest.mark.parametrize(("source", "change"), [(LOREFT, _renamed), (PATHS, _renamed), (PATHS, _indexed)])
def test_names_of_other_pyvene_versions(source, change, bare, tmp_path) -> None:
    """The same adapter under each of them."""
    copy = damaged(tmp_path, source, change)
    if bare:
        (copy / CONFIG).unlink()
    assert not {p.name for p in source.glob("intkey_*")} & {p.name for p in copy.glob("intkey_*")}
    quiet = {"report": lambda _: None}
    one, other = (import_adapter(s, str(BASE), tmp_path / n, SAID, **quiet).adapter for s, n in ((source, "one"), (copy, "other")))
    assert (one.sites, one.method, one.rank) == (other.sites, other.method, other.rank)
    assert all((one.tensors[name] == other.tensors[name]).all() for name in one.tensors)


def test_layers_that_no_block_has_mean_nothing_to_adapterhub(tmp_path) -> None:
    copy = damaged(tmp_path, HUB, edit_json(HUB_CONFIG, layers=[-1, 1, 2, 9]))
    one, other = (
        import_adapter(s, str(BASE), tmp_path / n, Request(), report=lambda _: None).adapter for s, n in ((HUB, "one"), (copy, "other"))
    )
    assert one.sites == other.sites and all((one.tensors[name] == other.tensors[name]).all() for name in one.tensors)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_head_of_a_base_that_is_tied_to_its_embedding(family, tmp_path) -> None:
    """The base's files hold the head under the embedding's name alone; a trained one is refused as on any base. gpt2's own checkpoints
    lack the prefix of their parameters."""
    width = {"hidden_size": 64, "num_hidden_layers": 4} if family == "llama" else {"n_embd": 64, "n_layer": 4}
    model = tiny.save_base(tmp_path / "tied", family, tie_word_embeddings=True, **width)
    weights = load_file(model / "model.safetensors")
    (embedding,) = (name for name in weights if name.endswith(("embed_tokens.weight", "wte.weight")))
    assert "lm_head.weight" not in weights
    if family == "gpt2":
        save_file({name.removeprefix("transformer."): value for name, value in weights.items()}, model / "model.safetensors")
    folder = damaged(tmp_path, HUB_HEAD, edit_json(HUB_CONFIG, model_type=family))
    for i, name in enumerate(("lm_head.weight", "heads.reft.0.weight")):
        torch.save({name: weights[embedding]}, folder / HUB_HEAD_BIN)
        import_adapter(folder, str(model), tmp_path / f"same{i}", Request(), report=lambda _: None)
        torch.save({name: weights[embedding] + 1}, folder / HUB_HEAD_BIN)
        refused(folder, tmp_path / "out", Request(), f"{name} differs from the head of tied", model=model)


def test_a_folder_of_adapters(tmp_path) -> None:
    """What AdapterHub's save_all_adapters writes: the folder inside is named."""
    for name in ("a", "b"):
        shutil.copytree(HUB, tmp_path / "all" / name)
    refused(tmp_path / "all", tmp_path / "out", Request(), "did you mean .*/all/a or .*/all/b")


def test_parameters_of_the_base_that_were_trained_too(tmp_path) -> None:
    """pyvene's include_model, which is the default of its trainer's checkpoints: nothing for a frozen base."""
    frozen = damaged(tmp_path, LOREFT, lambda f: torch.save({}, f / "pytorch_model.bin"))
    import_adapter(frozen, str(BASE), tmp_path / "out", SAID, report=lambda _: None)
    torch.save({"lm_head.weight": torch.zeros(2, 2)}, frozen / "pytorch_model.bin")
    refused(frozen, tmp_path / "out2", SAID, "holds 1 trained parameters of the base, first lm_head.weight")
    torch.save({"x": Hostile(tmp_path / "written")}, frozen / "pytorch_model.bin")
    refused(frozen, tmp_path / "out2", SAID, "its pickle asks for code to be run")


def test_another_base(tmp_path) -> None:
    """Foreign adapters have no fingerprint: the width and the depth tell."""
    wide = tiny.save_base(tmp_path / "wide", "llama", hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    refused(LOREFT, tmp_path / "out", SAID, "has width 64, wide has width 32; pass the base", model=wide)
    shallow = tiny.save_base(tmp_path / "shallow", "llama", num_hidden_layers=2)
    refused(LOREFT, tmp_path / "out", SAID, "layer 2 does not exist in this base .2 layers", model=shallow)
    refused(HUB, tmp_path / "out", Request(), "edits layers 1 to 2, shallow has 2", model=shallow)
    refused(LOREFT, tmp_path / "out", SAID, "config.json is missing", model=tmp_path)
    gpt2 = tiny.save_base(tmp_path / "gpt2", "gpt2")
    paths = FIXTURES / "pyreft-generated" / "loreft_paths" / "adapter"
    refused(paths, tmp_path / "out", SAID, r"component 'model.layers\[1\].mlp.output' is not a stream.*transformer.h\[0\].mlp", model=gpt2)


def test_sources_that_are_no_adapters(tmp_path, imported) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "nothing", tmp_path / "out", SAID, "does not exist")
    refused(tmp_path / "empty", tmp_path / "out", SAID, "holds neither pyreft's")
    refused(tmp_path / "peft", tmp_path / "out", SAID, "PEFT's .LORA.; it is not a ReFT")
    refused(tmp_path / "notes.txt", tmp_path / "out", SAID, "pass the folder")
    refused(LOREFT / BIN, tmp_path / "out", SAID, "pass the folder")
    refused(LOREFT, tmp_path / "out", SAID, "is no adapterhub adapter: adapter_config.json is missing", format="adapterhub")
    refused(LOREFT, tmp_path / "out", SAID, "is a folder; a gguf adapter is a file", format="gguf")
    refused(LOREFT, tmp_path / "out", SAID, "--format 'onnx' is unknown", format="onnx")
    refused(next(iter(imported.values())), tmp_path / "out", SAID, "is an adapter of this project already")


def test_checkpoint_of_a_trainer_has_no_classes(tmp_path) -> None:
    """Weights alone: the names of the tensors tell the class, but for Noreft and Nodireft."""
    quiet = {"report": lambda _: None}
    untied = FIXTURES / "pyreft" / "b_loreft_untied_r4_f1l1" / "adapter"
    paths = FIXTURES / "pyreft-generated" / "loreft_paths" / "adapter"
    direft = FIXTURES / "pyreft-generated" / "direft" / "adapter"
    for i, (source, positions, tied) in enumerate([(untied, "f1+l1", False), (paths, "f2+l2", True), (direft, "f2+l2", True)]):
        request = replace(SAID, positions=positions, tied=tied)
        whole = import_adapter(source, str(BASE), tmp_path / f"whole{i}", request, **quiet).adapter
        bare = Path(shutil.copytree(source, tmp_path / f"bare{i}"))
        (bare / "config.json").unlink()
        again = import_adapter(bare, str(BASE), tmp_path / f"again{i}", request, **quiet).adapter
        assert (whole.method, whole.sites, whole.tied) == (again.method, again.sites, again.tied)
        assert all((whole.tensors[name] == again.tensors[name]).all() for name in whole.tensors)
    bare = damaged(tmp_path, NOREFT, lambda f: (f / "config.json").unlink())
    refused(bare, tmp_path / "out", SAID, "class of its interventions.*--method noreft or --method direft")
    refused(bare, tmp_path / "out", replace(SAID, method="loreft"), "--method loreft contradicts the file")
    import_adapter(bare, str(BASE), tmp_path / "out", replace(SAID, method="noreft"), **quiet)
    trainer = tmp_path / "checkpoint"
    trainer.mkdir()
    bare.rename(trainer / "intervenable_model")
    refused(trainer, tmp_path / "o2", SAID, "did you mean .*intervenable_model")


def test_untied_without_a_prefix_or_a_suffix_is_pyrefts_all_positions(tmp_path) -> None:
    two = FIXTURES / "pyreft-generated" / "loreft_two_a_site_last" / "adapter"
    said = Request(positions="l1", activation="none")
    results = []
    for tied in (None, True, False):
        results.append(import_adapter(two, str(BASE), tmp_path / str(tied), replace(said, tied=tied), report=lambda _: None))
    assert len({tuple(sorted((name, t.tobytes()) for name, t in r.adapter.tensors.items())) for r in results}) == 1
    assert [len(r.notes) for r in results] == [0, 0, 1] and "--untied changes nothing" in results[2].notes[0]


def test_mixtures_that_no_adapter_holds(tmp_path) -> None:
    two = FIXTURES / "pyreft-generated" / "loreft_two_a_site" / "adapter"
    gelu = replace(SAID, activation="gelu")
    refused(two, tmp_path / "out", gelu, "mixes interventions that one site with activation gelu cannot hold: .*1#0 .loreft.")


def test_the_output_is_kept(tmp_path, imported) -> None:
    """Refused without --force; with it, a failed import leaves the old adapter and nothing else."""
    import_adapter(HUB, str(BASE), tmp_path / "out", Request(), report=lambda _: None)
    before = (tmp_path / "out" / "adapter.safetensors").read_bytes()
    refused(LOREFT, tmp_path / "out", SAID, "exists; choose another output or pass --force")
    bad = damaged(tmp_path, LOREFT, edit_state(BIN, lambda s: at(s, "weight", s["weight"] * float("inf"))))
    refused(bad, tmp_path / "out", SAID, "not finite", force=True)
    assert (tmp_path / "out" / "adapter.safetensors").read_bytes() == before
    refused(LOREFT, LOREFT.parent, SAID, "holds the input", force=True)
    refused(LOREFT, tmp_path / "base", SAID, "cannot be used")
    import_adapter(LOREFT, str(BASE), tmp_path / "out", SAID, force=True, report=lambda _: None)
    assert load_adapter(tmp_path / "out").training["imported_from"] == "pyreft"


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "reft_export.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.mark.slow
def test_command_line(tmp_path) -> None:
    common = (LOREFT, "-m", BASE, "-o", tmp_path / "mine")
    for arguments in (common, (*common, "--positions", "f2+l2", "--activation", "none", "--tied", "--format", "gguf")):
        done = cli("import", *arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")
    done = cli("import", *common, "--positions", "f2+l2", "--tied", "--activation", "none", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == "loreft" and json.loads(done.stdout)["tied"] is True
    back = cli("export", "-m", BASE, "-a", tmp_path / "mine", "-o", tmp_path / "back", "--format", "pyreft")
    assert back.returncode == 0 and "LoreftIntervention" in back.stdout, back.stderr
    again = cli("import", tmp_path / "back", "-m", BASE, "-o", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == (tmp_path / "mine" / "adapter.safetensors").read_bytes()
    refusal = cli("export", "-m", BASE, "-o", tmp_path / "none", "--format", "pyreft")
    assert refusal.returncode == 2 and "converts one adapter" in refusal.stderr


def test_safetensors_of_adapterhub(tmp_path) -> None:
    source = FIXTURES / "adapterhub-generated" / "direft_untied" / "adapter"
    request = Request(method="direft")
    copy = damaged(tmp_path, source, lambda f: (f / "adapter.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      "))
    refused(copy, tmp_path / "out", request, "holds 0 adapters")
    (copy / "adapter.safetensors").write_bytes((source / "adapter.safetensors").read_bytes()[:-8])
    refused(copy, tmp_path / "out", request, "adapter.safetensors is damaged")
    save_file({"x": torch.zeros(1)}, copy / "adapter.safetensors")
    refused(copy, tmp_path / "out", request, "holds x, which is no part of a ReFT")


def test_a_gguf_model_is_no_adapter(tmp_path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    refused(tmp_path / "model.gguf", tmp_path / "out", Request(), "is a GGUF model, not an adapter: a base goes to -m$")
    done = cli("inspect", tmp_path / "model.gguf")
    assert done.returncode == 2 and "is GGUF: a model goes to -m of train, import, export and quantize" in done.stderr
