"""A whole folded decoder on the fused kernel, on the function in its graph, and in eager PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

from reft_export.parity.ladder import host_ladder
from runtimes.artifacts.bundle import open_bundle
from runtimes.native_library import find_op_library
from runtimes.ort.session import OrtSession


@pytest.mark.parametrize("kernel", ["fused", "function"])
def test_every_rung_against_eager(kernel, base_folder, bundle_folder) -> None:
    if kernel == "fused" and find_op_library() is None:
        pytest.skip("this installation has no op library")
    report = host_ladder(open_bundle(bundle_folder("llama")), str(base_folder("llama")), kernel=kernel, report=lambda _: None)
    assert report.passed
    assert {"numpy", kernel} <= {rung.name.partition(",")[0] for rung in report.rungs}


def test_fused_equals_function(bundle_folder) -> None:
    if find_op_library() is None:
        pytest.skip("this installation has no op library")
    bundle = open_bundle(bundle_folder("llama"))
    fused, function = (OrtSession(bundle, kernel=kernel, threads=1) for kernel in ("fused", "function"))
    assert (fused.kernel, function.kernel) == ("fused", "function")
    ids = np.random.default_rng(0).integers(0, 250, (2, 12))
    base = None
    for adapter in (None, *bundle.adapter_names):
        logits = []
        for session in (fused, function):
            session.set_adapter(adapter)
            first = session.step(ids[:, :9], np.ones((2, 9)))
            later = session.step(ids[:, 9:10], np.ones((2, 10)), past=first.past)
            logits.append(np.concatenate([first.logits, later.logits], 1))
        assert np.abs(logits[0] - logits[1]).max() <= 2e-5 * np.abs(logits[1]).max()
        if adapter is None:
            base = logits[0]
        else:
            assert np.abs(logits[0] - base).max() > 1e-3 * np.abs(base).max(), "the adapter steers"
