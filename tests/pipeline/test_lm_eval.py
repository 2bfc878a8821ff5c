"""A bundle as a model of lm_eval: on tasks of a file beside this one a float bundle says what lm_eval's own ``hf`` model says of its base,
and of the base that hooks steer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'reft-export[lm-eval]'")

from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from reft_export.base.load import load_base  # noqa: E402
from reft_export.eager.steering import Steering, steered  # noqa: E402
from reft_export.evaluating.harness import BundleLM  # noqa: E402
from runtimes.edits.adapter import load_adapter  # noqa: E402
from runtimes.errors import InputError  # noqa: E402

pytestmark = pytest.mark.slow
TASKS = Path(__file__).parent / "lm_eval_tasks"
FIGURES = {
    "choose": ("acc,none", "acc_norm,none"),
    "roll": ("word_perplexity,none", "bits_per_byte,none"),
    "answer": ("exact_match,none",),
}


class SteeredHF(HFLM):
    """lm_eval's own model over a base whose hooks are on: told where each context ends, a request at a time."""

    steering: Steering

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        found = []
        for request in requests:
            fed = min(len(request[1]) + len(request[2]), self.max_length + 1)
            self.steering.prompt_length = [fed - len(request[2])]
            found += super()._loglikelihood_tokens([request], disable_tqdm=True)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self.steering.prompt_length = None  # a prompt comes alone
        return super().generate_until(requests, disable_tqdm=True)


@pytest.fixture(scope="module", autouse=True)
def _here(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tasks name their file by its name; what datasets makes of it goes away."""
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.chdir(TASKS)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def run(model: Any) -> dict[str, Any]:
    """Figures and logged answers, by task."""
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
    done = simple_evaluate(model=model, tasks=list(FIGURES), task_manager=tasks, bootstrap_iters=0, log_samples=True)
    return {
        name: ([done["results"][name][figure] for figure in figures], [each["resps"] for each in done["samples"][name]])
        for name, figures in FIGURES.items()
    }


def flat(value: Any) -> list[Any]:
    return [each for item in value for each in flat(item)] if isinstance(value, (list, tuple)) else [value]


@pytest.mark.parametrize("adapter", [None, "untied", "prompt-relu"])
def test_a_float_bundle_is_lm_evals_own_model(adapter, float_bundle, adapter_folders) -> None:
    bundle, model = float_bundle()
    base = load_base(model)
    own = run(BundleLM(str(bundle), adapter, batch_size=4))
    if adapter is None:
        expected = run(HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=1))
    else:
        (folder,) = adapter_folders("llama", (adapter,))
        with steered(base.model, load_adapter(folder)) as steering:
            hf = SteeredHF(pretrained=base.model, tokenizer=base.tokenizer, batch_size=1)
            hf.steering = steering
            expected = run(hf)
    for name, (figures, answers) in expected.items():
        assert own[name][0] == pytest.approx(figures, rel=2e-5), name  # lm_eval prints four digits
        for mine, theirs in zip(flat(own[name][1]), flat(answers), strict=True):
            assert mine == (pytest.approx(theirs, rel=1e-4) if isinstance(theirs, float) else theirs), name


def test_what_it_is_asked_and_cannot(float_bundle) -> None:
    bundle, _ = float_bundle()
    lm = BundleLM(str(bundle), batch_size="auto", max_length=40)
    request = type("Asked", (), {"args": ("Hello", {"until": ["."], "num_beams": 4})})()
    with pytest.raises(InputError, match=r"generation_kwargs have \['num_beams'\]"):
        lm.generate_until([request])
    request.args = ("Hello", {"max_gen_toks": 40})
    with pytest.raises(InputError, match="40 new tokens, which leave none of 40"):
        lm.generate_until([request])
    request.args = ("Hello " * 50, {"max_gen_toks": 8, "until": []})
    assert len(lm.generate_until([request], disable_tqdm=True)) == 1, "a long prompt loses its beginning"
    with pytest.raises(InputError, match="leave --apply_chat_template out"):
        lm.apply_chat_template([{"role": "user", "content": "Hello"}])


def test_the_command(float_bundle, tmp_path) -> None:
    bundle, _ = float_bundle()
    command = [sys.executable, "-m", "reft_export.lm_eval", "run", "--model", "reft-export", "--include_path", str(TASKS)]
    arguments = ["--tasks", "choose", "--output_path", str(tmp_path), "--model_args"]
    done = subprocess.run([*command, *arguments, f"bundle={bundle},adapter=untied"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "acc_norm" in done.stdout, done.stderr[-2000:]
    (record,) = tmp_path.rglob("results*.json")
    assert json.loads(record.read_text())["results"]["choose"]["alias"] == "choose"
    done = subprocess.run([*command, *arguments, f"bundle={tmp_path}"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: ") and "not a bundle" in done.stderr
