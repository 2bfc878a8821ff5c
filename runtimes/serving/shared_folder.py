"""A folder of adapters that several processes serve: each sees what another one wrote, replaced or deleted, when it is next asked for it.

An adapter that was replaced is loaded anew once what runs with the old one has ended; requests that come meanwhile wait. The other
processes go on with theirs, so that an update rolls over them.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from runtimes.artifacts.adapter_record import check_adapter_name
from runtimes.edits.adapter import CONFIG_FILE, TENSOR_FILE
from runtimes.errors import ReftError
from runtimes.serving.refusals import Refusal
from runtimes.serving.server import TextServer

WAIT = 0.02
"""Seconds between two looks."""

Stamp = tuple[tuple[int, int, int], ...]
"""Of each file: its number, its time in ns, its bytes."""


class SharedFolder:
    """``server``'s folder of adapters; on one event loop. Without a folder there is nothing to notice."""

    def __init__(self, server: TextServer) -> None:
        self._server = server
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._users: Counter[str] = Counter()
        self._stamps: dict[str, Stamp] = {}
        """Of what is listed."""
        for name in self._listed():
            if (stamp := self._stamp(name)) is not None:
                self._stamps[name] = stamp

    @asynccontextmanager
    async def use(self, name: str | None, *, changes: bool = False) -> AsyncIterator[None]:
        """Within, the adapter is what the folder holds, and nobody here replaces it; ``changes``: but for who is within, alone."""
        if name is None or not self._of_folder(name):
            yield
        elif changes:
            async with self._turns[name]:
                await self._unused(name)
                yield
                self._keep(name, self._stamp(name))
        else:
            await self._refresh(name)
            self._users[name] += 1
            try:
                yield
            finally:
                self._users[name] -= 1
                if not self._users[name]:  # nor is a count kept for whatever clients write
                    del self._users[name]

    async def refresh_all(self) -> None:
        """Before all are told."""
        with suppress(ReftError):  # a name that is none: it is refused at a start, and not listed here
            await asyncio.to_thread(self._scan)
        for name in self._listed():
            await self._refresh(name)

    async def _refresh(self, name: str) -> None:
        if name not in self._server.bank and self._stamp(name) is None:
            return  # and no turn is kept for whatever clients write
        async with self._turns[name]:
            while (now := self._stamp(name)) != self._stamps.get(name) or (now is not None) != (name in self._server.bank):
                if now is None:  # one that is replaced is away for a moment
                    await asyncio.sleep(WAIT)
                    now = self._stamp(name)
                await self._unused(name)
                try:
                    with self._server.changing(name):
                        if name in self._server.bank:
                            self._server.bank.remove(name)
                        with suppress(ReftError):
                            await asyncio.to_thread(self._scan)
                except Refusal:  # a row whose client hung up is there until the next step
                    await asyncio.sleep(WAIT)
                    continue
                self._keep(name, now)
                if name not in self._server.bank:
                    return
                with suppress(ReftError):  # what it is, its request is told; of files that were replaced meanwhile, the next look tells
                    await asyncio.to_thread(self._server.bank.load, name)

    async def _unused(self, name: str) -> None:
        while self._users[name]:
            await asyncio.sleep(WAIT)

    def _keep(self, name: str, stamp: Stamp | None) -> None:
        if stamp is None:
            self._stamps.pop(name, None)
        else:
            self._stamps[name] = stamp

    def _scan(self) -> None:
        if self._server.settings.adapters is not None:
            self._server.bank.scan(self._server.settings.adapters)

    def _listed(self) -> list[str]:
        return [name for name, each in self._server.bank.listed.items() if each.folder is not None]

    def _of_folder(self, name: str) -> bool:
        """Whether the folder could hold it: no path, and none of the bundle's own."""
        try:
            known = self._server.bank.listed.get(check_adapter_name(name))
        except ReftError:
            return False
        return self._server.settings.adapters is not None and (known is None or known.folder is not None)

    def _stamp(self, name: str) -> Stamp | None:
        """None: there is no such adapter."""
        assert self._server.settings.adapters is not None
        try:
            found = [os.stat(self._server.settings.adapters / name / file) for file in (CONFIG_FILE, TENSOR_FILE)]
        except (OSError, ValueError):
            return None
        return tuple((each.st_ino, each.st_mtime_ns, each.st_size) for each in found)
