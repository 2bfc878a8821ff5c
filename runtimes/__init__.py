"""What the device needs: the edit, its file formats, sessions, generation, parity. Imports neither torch nor transformers nor onnx.

    from runtimes import check_golden, generate, open_artifact, open_session
    from runtimes.text.tokenizer import Tokenizer

    artifact = open_artifact("pirate-bundle")
    tokenizer = Tokenizer.load(artifact.folder, artifact.manifest.model)
    with open_session(artifact, adapter="pirate") as session:
        print(generate(session, tokenizer, ["Once upon a time"])[0].text)
        check_golden(artifact, session).require()

Each name is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtimes.generation import generate
    from runtimes.golden import check_golden
    from runtimes.open import open_artifact, open_bank, open_batcher, open_session
    from runtimes.upgrade import upgrade_folder

__all__ = ["check_golden", "generate", "open_artifact", "open_bank", "open_batcher", "open_session", "upgrade_folder"]

_HOMES = {
    "check_golden": "runtimes.golden",
    "generate": "runtimes.generation",
    "open_artifact": "runtimes.open",
    "open_bank": "runtimes.open",
    "open_batcher": "runtimes.open",
    "open_session": "runtimes.open",
    "upgrade_folder": "runtimes.upgrade",
}
"""No submodule may have one of these names: its import would put the module in the function's place."""

if not TYPE_CHECKING:  # a type checker reads the imports above; with __getattr__ it would take every other name for one, too

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
