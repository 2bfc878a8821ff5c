"""The quickstart's base model, its language and its task: everything `reft-export quickstart` needs, offline.

    lexicon      the words: who and what the texts are about, and how verbs are conjugated
    stories      the grammar: what can be asked about a subject, and the sentences that answer it
    pirate       the second register, and the words that give it away
    corpus       the seeded mixture of exchanges that the base is trained on
    task         the steering task: pirate training examples, held-out prompts and the checker
    train_base   `python -m reft_export.quickstart.train_base OUT_DIR` trains the tokenizer and the model
    base/        what that script wrote: a Llama-architecture model of about a million parameters, with its tokenizer

Importing this package or any module but `train_base` needs the standard library only.
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
        raise FileNotFoundError(
            f"the quickstart's base model is not in {folder}; reinstall reft-export, or train it again with "
            f"`python -m reft_export.quickstart.train_base {folder}`"
        )
    return folder
