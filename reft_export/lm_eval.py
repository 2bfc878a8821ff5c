"""``python -m reft_export.lm_eval``: lm-evaluation-harness's own command line, which knows the model ``reft-export``, too.

lm_eval 0.4.13 looks for models in its own table alone: no entry point adds one, so whoever adds one starts its command line.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from reft_export.console import err
from runtimes.errors import ReftError


def main() -> int:
    """The exit code. Everything behind the name is lm_eval's; a mistake that this project words is one line."""
    if find_spec("lm_eval") is None:
        return _failed("lm_eval is not installed; pip install 'reft-export[lm-eval]'", 4)
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    import reft_export.evaluating.harness  # noqa: F401  # registers the model

    try:
        cli_evaluate()
    except ReftError as e:
        return _failed(str(e), e.exit_code)
    return 0


def _failed(message: str, code: int) -> int:
    err.print(f"error: {message}", markup=False)
    return code


if __name__ == "__main__":
    sys.exit(main())
