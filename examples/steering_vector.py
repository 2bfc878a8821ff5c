"""A steering vector from two prompts: the difference of their mean activations, added behind one block at every token.

`python examples/steering_vector.py` writes examples-out/ahoy and examples-out/vector-bundle.
"""

from pathlib import Path

import numpy as np
import torch

from reft_export import export_bundle, import_adapter, load_base
from reft_export.exporting.settings import ExportSettings
from reft_export.importing.foreign import Request
from reft_export.quickstart import base_path
from runtimes import generate, open_artifact, open_session
from runtimes.generation import GenerationSettings
from runtimes.text.tokenizer import Tokenizer

OUT = Path("examples-out")
BASE = base_path()
LAYER, SCALE = 2, 1.0
TOWARDS = "Ahoy, the fox were brave, matey! Arr, it sailed the seven seas, ye scallywag!"
AWAY = "The fox was brave. Then it sailed home over the sea, and was happy."

base = load_base(BASE, require_tokenizer=True)


@torch.no_grad()
def mean_activation(text: str) -> np.ndarray:
    """[D], the mean over the text's tokens of what block LAYER gives out."""
    hidden = base.model(**base.tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
    return hidden[LAYER + 1][0].mean(0).numpy()


OUT.mkdir(exist_ok=True)
vector = mean_activation(TOWARDS) - mean_activation(AWAY)
np.savez(OUT / "vector.npz", **{f"{LAYER}.block_output": vector})
print(f"the vector's norm is {np.linalg.norm(vector):.2f}, that of the activation {np.linalg.norm(mean_activation(AWAY)):.2f}")

import_adapter(OUT / "vector.npz", str(BASE), OUT / "ahoy", Request(positions="all", scale=SCALE), force=True)
export_bundle(BASE, [OUT / "ahoy"], OUT / "vector-bundle", ExportSettings(), force=True)

bundle = open_artifact(OUT / "vector-bundle")
tokenizer = Tokenizer.load(bundle.folder, bundle.manifest.model)
with open_session(bundle) as session:
    for adapter in (None, "ahoy"):
        session.set_adapter(adapter)
        (answer,) = generate(session, tokenizer, ["Once upon a time there was"], GenerationSettings(max_new_tokens=48))
        print(f"{adapter or 'base'}: {answer.text}")
