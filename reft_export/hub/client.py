"""What the hub is asked, through huggingface_hub, and what is said where it does not do it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

from reft_export.base.hub import HUB_ID, without_retry_warnings
from reft_export.base.model_folder import first_line
from runtimes.artifacts.bundle import ENGINE_MANIFEST
from runtimes.artifacts.manifest import MANIFEST_FILE
from runtimes.edits.adapter import CONFIG_FILE
from runtimes.errors import InputError
from runtimes.files.folders import disk_is_full

KINDS = {CONFIG_FILE: "adapter", MANIFEST_FILE: "bundle", ENGINE_MANIFEST: "engine"}
"""By the file that tells it."""
TOKEN = "HF_TOKEN, or what `hf auth login` stored"
NO_REVISION = re.compile(r"^$|^[-./]|[./]$|\.lock$|\.\.|/[./]|@\{|[\x00-\x20\x7f~^:?*\[\\]")
"""git-check-ref-format's rules."""
LONGEST_REVISION = 200
"""Bytes, as they are quoted in addresses and in the name of a file, which has 255 at most."""


def check_repository(repository: str) -> None:
    """Raises InputError for what is no ``owner/name``."""
    if not HUB_ID.fullmatch(repository) or "/" not in repository:
        raise InputError(f"{repository!r} is no repository of a hub, whose form is owner/name")


def check_revision(revision: str | None) -> None:
    """Raises InputError for what git takes for no name of a branch, a tag or a commit: it becomes part of addresses and of paths."""
    if revision is not None and (NO_REVISION.search(revision) or len(quote(revision, safe="")) > LONGEST_REVISION):
        raise InputError(f"{revision[:LONGEST_REVISION]!r} is no revision of a repository; name a branch, a tag or a commit")


@contextmanager
def asking(repository: str, revision: str | None = None) -> Iterator[None]:
    """Around calls of huggingface_hub alone: whatever they raise is an InputError of one line, and what they try again is not said. A full
    disk is not the hub's fault."""
    from huggingface_hub import constants

    try:
        with without_retry_warnings():
            yield
    except Exception as e:  # the hub's errors, those of the transport under it, which is another from release to release, and ValueError
        if disk_is_full(e):
            raise
        raise InputError(_told(e, repository, revision, constants.ENDPOINT)) from e


def _told(e: Exception, repository: str, revision: str | None, hub: str) -> str:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = getattr(getattr(e, "response", None), "status_code", None)
    if isinstance(e, OfflineModeIsEnabled):
        return f"no hub is asked while HF_HUB_OFFLINE is set; unset it to reach {hub}"
    if isinstance(e, HFValidationError):
        return f"{repository!r} is no repository of a hub: {first_line(e)}"
    if isinstance(e, RevisionNotFoundError):
        return f"{repository} has no revision {revision} on {hub}; name a branch, a tag or a commit of it, or leave --revision out"
    if isinstance(e, GatedRepoError):
        return f"{repository} is gated on {hub}; accept its terms on its page, with the account of the token ({TOKEN})"
    if isinstance(e, RepositoryNotFoundError):
        return f"{repository} is not on {hub}, or is private and not the token's to see; check the name, and the token ({TOKEN})"
    if status == 401:
        return f"{hub} knows no such token, or was given none; set {TOKEN}"
    if status == 403:
        return f"{hub} does not let this token do that with {repository}; take one that may write there ({TOKEN})"
    if status == 412:
        return f"{repository} was written by somebody else meanwhile, and is left as they left it; look at it, and push again"
    if isinstance(e, EntryNotFoundError) and status is not None:
        return f"{repository} lacks a file that its own record names ({first_line(e)}); it has to be pushed again"
    if status is not None:
        return f"{hub} answers {status} of {repository}: {first_line(e)}; try again later"
    return f"{hub} does not answer, or broke off ({first_line(e)}); check the network and HF_ENDPOINT, and try again"
