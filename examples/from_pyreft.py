"""An adapter that pyreft trained and saved: imported, exported with its base, and held against what pyreft itself answered.

`python examples/from_pyreft.py`, in a clone: the adapter is one of the tests'.
"""

from pathlib import Path

import numpy as np

from reft_export import export_bundle, import_adapter
from reft_export.exporting.settings import ExportSettings
from reft_export.importing.foreign import Request
from runtimes import open_artifact, open_session

OUT = Path("examples-out")
FIXTURES = Path(__file__).parent.parent / "tests" / "interop" / "fixtures"
BASE, CASE = FIXTURES / "base-llama-tiny", FIXTURES / "pyreft" / "a_loreft_tied_r4_f2l2"

# pyreft does not record where an adapter acts, whether prefix and suffix share it, nor its activation: nothing is guessed.
request = Request(positions="f2+l2", tied=True, activation="none")
imported = import_adapter(CASE / "adapter", str(BASE), OUT / "from-pyreft", request, force=True)
print(f"{imported.adapter.method} of rank {imported.adapter.rank} at {', '.join(map(str, imported.adapter.sites))}")
for note in imported.notes:
    print(f"note: {note}")
export_bundle(BASE, [OUT / "from-pyreft"], OUT / "from-pyreft-bundle", ExportSettings(), force=True)

# io.npz: input_ids [1, S] and pyreft's logits [1, S, V / 3], every third of the vocabulary.
recorded = np.load(CASE / "io.npz")
ids, theirs = recorded["single/input_ids"], recorded["single/logits"]
with open_session(open_artifact(OUT / "from-pyreft-bundle")) as session:
    for adapter in (None, "from-pyreft"):
        session.set_adapter(adapter)
        ours = session.step(ids, np.ones_like(ids)).logits[..., ::3]
        difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
        print(f"{adapter or 'base'}: {difference:.1e} of the largest logit away from pyreft's steered answer")
