"""``reft-export push``: an adapter or a bundle onto a Hugging Face hub, in one commit, with a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from reft_export.base.hub import without_progress_bars
from reft_export.hub.card import adapter_card, bundle_card
from reft_export.hub.client import KINDS, asking, check_repository, check_revision
from reft_export.importing.foreign import Report
from runtimes.artifacts.bundle import ENGINE_MANIFEST, open_bundle
from runtimes.artifacts.manifest import MANIFEST_FILE, NOT_HASHED
from runtimes.edits.adapter import CONFIG_FILE, PROBES_FILE, TENSOR_FILE, load_adapter
from runtimes.errors import InputError

CARD = "README.md"
OF_GIT = ".gitattributes"
"""The hub writes it into every repository, and keeps it."""


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """What would be pushed, read and verified."""

    kind: str
    files: Mapping[str, Path]
    card: str

    @property
    def size(self) -> int:
        """Bytes, without the card."""
        return sum(path.stat().st_size for path in self.files.values())


@dataclass(frozen=True, kw_only=True)
class Pushed:
    url: str
    commit: str


def outgoing(folder: Path, repository: str, *, base_model: str | None = None, license: str | None = None) -> Outgoing:
    """``folder`` as it would be pushed to ``repository`` (owner/name): every file that its own record lists, and a card.

    Asks no hub. Raises InputError for an engine, for what is neither adapter nor bundle, and for a name that is no repository's;
    AdapterError and BundleError for files that do not match their digests.
    """
    check_repository(repository)
    if base_model is not None:
        check_repository(base_model)
    if (folder / ENGINE_MANIFEST).is_file():
        raise InputError(f"{folder} is an engine, which runs on the GPU it was built for; push the bundle, and build it there")
    if (folder / CONFIG_FILE).is_file():
        adapter = load_adapter(folder)
        names = [CONFIG_FILE, TENSOR_FILE, *([PROBES_FILE] if adapter.probes else [])]
        card = adapter_card(adapter, repository, base_model=base_model, license=license)
        return Outgoing(kind="adapter", files={name: folder / name for name in names}, card=card)
    if not (folder / MANIFEST_FILE).is_file():
        raise InputError(f"{folder} is neither an adapter nor a bundle; push a folder that train, import, export or fold wrote")
    bundle = open_bundle(folder, verify=True)
    names = [*bundle.manifest.files, *(name for name in NOT_HASHED if (folder / name).is_file())]
    if linked := [name for name in NOT_HASHED if name != MANIFEST_FILE and (folder / name).is_symlink()]:
        raise InputError(f"{folder / linked[0]} is a link, and no digest tells whether it leads to what is meant; put a copy in its place")
    card = bundle_card(bundle, repository, base_model=base_model, license=license)
    return Outgoing(kind="bundle", files={name: folder / name for name in names}, card=card)


def push_folder(
    content: Outgoing,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    force: bool = False,
    report: Report = print,
) -> Pushed:
    """Makes ``repository`` where there is none, and puts ``content`` there in one commit: all of it, or nothing.

    ``private``: nobody else sees it. ``revision``: a branch, made of main where there is none; None: main. ``force``: an adapter or a
    bundle that lies there is replaced, its card too; what is no file of the new one is gone in the new commit, and in the old ones still.

    The token is HF_TOKEN, or what ``hf auth login`` stored. Raises InputError for a hub that does not answer or refuses, and, before
    anything is sent, for a repository that is in the way.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_revision(revision)
    api = HfApi()
    report(f"asking for {repository}")
    there = _found(repository, revision, private=private)
    if there is not None:
        _check_free(repository, there.files, force=force)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=content.card.encode()),
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in content.files.items()),
        *(CommitOperationDelete(path_in_repo=name) for name in sorted((there.files if there else set()) - {*content.files, CARD})),
    ]
    with asking(repository, revision), without_progress_bars():
        if there is None:
            api.create_repo(repository, private=private)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        report(f"pushing {len(content.files)} files")
        message, parent = f"reft-export push: {content.kind}", there.commit if there else None
        done = api.create_commit(repository, operations, commit_message=message, revision=revision, parent_commit=parent)
    return Pushed(url=f"{api.endpoint}/{repository}", commit=str(done.oid))


class _There(NamedTuple):
    """What a branch holds. ``commit``: its newest, which the new one follows, or is refused: nobody's files of meanwhile are replaced."""

    files: set[str]
    commit: str | None


def _found(repository: str, revision: str | None, *, private: bool) -> _There | None:
    """Of a repository that is there, at the branch, or where that is new at main; None where there is no repository. Raises InputError for
    one that everybody sees where nobody else is to."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    with asking(repository, revision):
        try:
            info = api.model_info(repository, revision=revision)
        except RevisionNotFoundError:
            info = api.model_info(repository)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:  # or one that the token may not see, which its creation tells
            return None
    if private and not info.private:
        raise InputError(f"{repository} is there and public, and --private makes new repositories alone; make it private on its page first")
    return _There({sibling.rfilename for sibling in info.siblings or ()} - {OF_GIT}, info.sha)


def _check_free(repository: str, there: set[str], *, force: bool) -> None:
    """As ``runtimes.files.folders.check_destination``."""
    if not there:
        return
    if not force:
        raise InputError(f"{repository} holds files already ({sorted(there)[0]}); choose another, or pass --force to replace them")
    if not there & set(KINDS) and there != {CARD}:
        raise InputError(f"{repository} holds other files than ours ({sorted(there)[0]}), and --force would delete them; choose another")
