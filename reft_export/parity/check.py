"""``reft-export parity``: a bundle or an engine against eager PyTorch, run again now or as its golden arrays recorded it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runtimes.artifacts.bundle import Bundle
from runtimes.errors import InputError
from runtimes.golden import check_golden
from runtimes.open import open_artifact, open_session
from runtimes.parity.figures import ParityReport


def check_parity(
    artifact: Path | str,
    model: str | None = None,
    *,
    provider: str | None = None,
    kernel: str | None = None,
    accept_base: bool = False,
    verify: bool = False,
    report: Callable[[str], None] = print,
) -> ParityReport:
    """Holds the bundle or engine in a folder against eager PyTorch; a missed budget is in the report, whose ``require`` raises it.

    Without ``model`` the golden arrays serve, and neither torch nor transformers is imported. With the base's folder or hub id eager
    PyTorch runs again, and every rung of a bundle is gone through: the edit alone, the exported graph, the folded one, the quantized one.
    Figures are of logits [K, V], over K tokens, relative to the largest reference logit; KL is in nats.

    ``provider``, ``kernel``: as of ``runtimes.open_session``. ``accept_base``: a base that differs in its config alone will do.
    ``verify``: large files are hashed again, too. ``report`` is told each stage.

    Raises InputError for ``model`` with an engine, and for a provider or kernel that the artifact cannot have; BundleError for a folder
    that is damaged or has no golden arrays; AdapterError where ``model`` is not the base that the bundle was made from.

    Example::

        result = check_parity("pirate-bundle", "base")
        for row in result.rows():
            print(*row, sep="  ")
        result.require()
    """
    opened = open_artifact(artifact, verify=verify)
    if model is None:
        report("running the golden inputs")
        with open_session(opened, provider=provider, kernel=kernel) as session:
            return check_golden(opened, session)
    if not isinstance(opened, Bundle):
        raise InputError(
            f"--model goes through the rungs of a bundle; {artifact} is an engine: its golden arrays are the eager model's, drop -m"
        )
    # The golden arrays are held on devices that have no torch.
    from reft_export.parity.ladder import host_ladder

    return host_ladder(opened, model, provider=provider or "cpu", kernel=kernel, accept_base=accept_base, report=report)
