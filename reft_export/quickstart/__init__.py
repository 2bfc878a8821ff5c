"""The quickstart's base model and its task: everything `reft-export quickstart` needs, offline.

story    the run: train, export, calibrate, quantize, refit, compare
report   report.html
task     the steering task: pirate training examples, held-out prompts and the checker
upper    the task on a real model: answers in upper case
subjects the built-in base or a real model, each with its task and settings
base/    a Llama-architecture model of about a million parameters, with its tokenizer
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def base_path() -> Path:
    """The folder of the shipped base model; `AutoModelForCausalLM.from_pretrained(base_path())` opens it.

    Raises FileNotFoundError where the package was installed without its data files.
    """
    folder = Path(str(resources.files(__name__).joinpath("base")))
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"the quickstart's base model is not in {folder}; reinstall reft-export")
    return folder
