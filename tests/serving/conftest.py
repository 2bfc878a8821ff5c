from __future__ import annotations

from collections.abc import Iterator

import pytest
from served import Served, serving, toy

from runtimes.artifacts.bundle import Bundle
from runtimes.ort.session import OrtSession
from runtimes.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy(tmp_path_factory.mktemp("serving") / "bundle")


@pytest.fixture(scope="session")
def alone(bundle: Bundle) -> OrtSession:
    """A session of its own, for the answer that nobody else runs beside."""
    return OrtSession(bundle, threads=1)


@pytest.fixture(scope="session")
def tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer.load(bundle.folder, bundle.manifest.model)


@pytest.fixture(scope="module")
def served(bundle: Bundle) -> Iterator[Served]:
    """Open to all, with no limits but the usual ones."""
    with serving(bundle) as each:
        yield each
