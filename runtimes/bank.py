"""The adapters of one bundle that are in memory, stacked, so that every row of a batch may have another one.

    bank = AdapterBank(bundle, max_bytes=64 << 20)
    bank.scan("adapters")                                       # ten thousand folders by name and size; nothing of them is read
    with AdapterRows(bank, ["pirate", None, "polite"]) as rows:     # runtimes/rows.py; None is the base
        session.set_rows(rows)
        session.step(ids, mask)                                 # [3, S]
        rows[1] = "pirate"                                      # between two steps

An adapter has a run of slots, one for each of its position groups, or sets of position rules, at the same place in the bank of every edit
node that it uses; at the others its slots hold no edit or lie behind the last one. The rule of its row names the first of them
(reft.first_slot), or the row's slots are handed in where no graph computes them. Banks grow with
what is loaded: N slots of the largest rank, zero rows where an adapter's is less.

``Scaled("pirate", 0.5)`` in place of a name is the adapter at another strength (runtimes/edits/strength.py), in slots of its own.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock

import numpy as np

from runtimes.artifacts.adapter_record import check_adapter_name
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.listed_files import BANKS, EXPLICIT_BANKS
from runtimes.bank_files import Edits, ListedAdapter, adapters_in, listed_adapter, rank_of, read_edits
from runtimes.edits.adapter import CONFIG_FILE, TENSOR_FILE
from runtimes.edits.op import PROMPT_LENGTH, RULE_DEFAULTS, EditNode
from runtimes.edits.positions import UNMARKED, Positions, RuleSets, needs_marks, needs_slots, slot_count, slots
from runtimes.edits.strength import Scaled, Steering, at_strength, parts_of, scaled_banks
from runtimes.errors import AdapterError, InputError
from runtimes.files.folders import name_of
from runtimes.precision import NUMPY_DTYPES
from runtimes.stacked import Slots, StackedNode

RULE = tuple(name for name in RULE_DEFAULTS if name != PROMPT_LENGTH)
"""The numbers of a row's rule that follow from its adapter."""
IDLE_STRENGTHS = 32
"""Adapters at a strength that stay in memory while they steer no row: requests may ask for any number of them."""
BASE_RULE = np.array([RULE_DEFAULTS[name] for name in RULE], np.int64)


class BankFull(InputError):
    """Adapters that steer rows leave another one no room within max_bytes: it fits once some of them are released."""


@dataclass(frozen=True, kw_only=True)
class BankMemory:
    """Bytes: ``adapters``, of the resident adapters' edits by themselves; ``banks``, of the arrays that hold them stacked."""

    adapters: int
    banks: int

    @property
    def factor(self) -> float:
        """What stacking costs: ranks filled up to the largest, nodes that not every adapter uses, slots to spare."""
        return self.banks / self.adapters if self.adapters else 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class StackedBanks:
    """Every bank of the graph by the name of its input, as a session binds them.

    ``version`` counts up where arrays are replaced, ``writes`` where anything in them changes, too: what copied them copies them again.
    Slots that no row uses are written while sessions read the others.
    """

    arrays: Mapping[str, np.ndarray]
    version: int
    writes: int


@dataclass(frozen=True, kw_only=True)
class ExplicitSlots:
    """Of a resident adapter whose slots no graph computes: where it edits, and the first of its slots."""

    where: Positions
    tied: bool
    first: int

    def of(self, attention_mask: np.ndarray, width: int, prompt_length: np.ndarray, marks: np.ndarray | None = None) -> np.ndarray:
        """int32 [B, S]: as ``runtimes.edits.positions.slots``, of its own slots."""
        own = slots(self.where, attention_mask, width, tied=self.tied, prompt_length=prompt_length, marks=marks)
        return np.where(own >= 0, own + self.first, -1).astype(np.int32)


@dataclass(kw_only=True, eq=False)
class _Resident:
    slots: range
    ranks: Mapping[EditNode, int]
    size: int
    rule: np.ndarray
    """[7], in the order of RULE."""
    explicit: ExplicitSlots | None = None
    """Of positions that no graph computes."""
    number: int = 0
    """Of its load."""
    rows: int = 0
    """Live ones, of all batches."""


class AdapterBank:
    """The adapters of ``bundle`` and of folders beside it, as they are loaded and evicted; of any number of sessions, in any threads.

    ``max_bytes``: of the stacked banks. Where another adapter does not fit, those that were used longest ago go, but none that steers a
    row. Each is verified when it is loaded: digests, values, and, from a folder, base, sites and ops as ``reft-export add`` does.

    Raises InputError for a bundle of version 1, whose rows share one rule, and for a classifier's, whose adapters bring heads, of which a
    batch has one.
    """

    def __init__(self, bundle: Bundle, *, max_bytes: int | None = None) -> None:
        if not bundle.manifest.mixes_rows:
            raise InputError(f"{bundle.folder} is of version 1, and all rows of a batch share one adapter; export the bundle again")
        if bundle.manifest.head:
            raise InputError(f"{bundle.folder} is a classifier, whose adapters bring heads, and a batch has one; use set_adapter")
        if max_bytes is not None and max_bytes < 1:
            raise InputError(f"max_bytes is {max_bytes}, expected at least 1, or None for no bound")
        self.bundle = bundle
        self.max_bytes = max_bytes
        self._lock = RLock()
        dtype = NUMPY_DTYPES[bundle.manifest.precision]
        self._nodes = {node: StackedNode(node, bundle.manifest.model.hidden_size, dtype) for node in bundle.nodes}
        self.stacked = StackedBanks(arrays=self._arrays(), version=0, writes=0)
        """Replaced whole: who reads it waits for no load, and has in it whatever was resident before."""
        self._slots = Slots()
        self._residents: OrderedDict[Steering, _Resident] = OrderedDict()
        self._scaled: OrderedDict[Scaled, None] = OrderedDict()
        """Those of the residents at a strength; used longest ago first."""
        files = bundle.manifest.files
        paths = {n: [f"adapters/{n}.{suffix}" for suffix in (BANKS, EXPLICIT_BANKS)] for n in bundle.adapter_names}
        listed = (ListedAdapter(name=n, size=sum(files[path].size for path in each if path in files)) for n, each in paths.items())
        self._listed = {each.name: each for each in listed}

    # --- what there is ---

    @property
    def listed(self) -> Mapping[str, ListedAdapter]:
        """Every adapter that it can load, by name."""
        with self._lock:
            return dict(self._listed)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.listed)

    def __contains__(self, name: str) -> bool:
        return name in self._listed

    @property
    def resident(self) -> tuple[str, ...]:
        """What is in memory, at whatever strength; used longest ago first."""
        with self._lock:
            return tuple(dict.fromkeys(parts_of(key)[0] for key in self._residents))

    @property
    def memory(self) -> BankMemory:
        with self._lock:
            return BankMemory(adapters=sum(r.size for r in self._residents.values()), banks=sum(n.size for n in self._nodes.values()))

    def scan(self, folder: Path | str) -> tuple[ListedAdapter, ...]:
        """Lists the adapters that are folders in ``folder``, as ``reft-export train`` and ``import`` write them; reads none of them.

        What is no adapter is passed over; of an earlier scan of it, what is gone is forgotten unless it is resident. Raises InputError
        for a folder that cannot be read and for a name that is taken, AdapterError for a name that no adapter can have.
        """
        folder = Path(os.path.abspath(folder))
        found = list(adapters_in(folder))
        with self._lock:
            for each in found:
                self._check_free(each)
            seen = {each.name for each in found}
            gone = [n for n, each in self._listed.items() if each.folder is not None and each.folder.parent == folder and n not in seen]
            for name in gone:
                if not self._strengths(name):
                    del self._listed[name]
            self._listed.update((each.name, each) for each in found)
        return tuple(found)

    # --- loading and evicting ---

    def add(self, folder: Path | str, name: str | None = None) -> str:
        """Lists the adapter in ``folder`` and loads it; its name, by default the folder's. One that is resident is loaded anew, unless it
        steers a row. Raises what ``scan``, ``evict`` and ``load`` raise."""
        folder = Path(os.path.abspath(folder))
        listed = listed_adapter(folder, check_adapter_name(name_of(folder) if name is None else name))
        if listed is None:
            raise AdapterError(f"{folder} is not an adapter folder: {CONFIG_FILE} or {TENSOR_FILE} is missing")
        with self._lock:
            known = listed.name in self._listed
            self._check_free(listed)
            if self._strengths(listed.name):  # its files may be others by now
                self.evict(listed.name)
            self._listed[listed.name] = listed
        try:
            self.load(listed.name)
        except BaseException:
            if not known:
                del self._listed[listed.name]
            raise
        return listed.name

    def check(self, listed: ListedAdapter) -> None:
        """Reads the adapter and loads nothing. Raises what ``load`` raises where it is damaged, or fits neither the bundle nor the bank."""
        edits, where, tied = read_edits(self.bundle, listed)
        self._check_alone(listed.name, slot_count(where, tied=tied), {node: rank_of(node, arrays) for node, arrays in edits.items()})

    def load(self, steering: Steering) -> None:
        """Puts the adapter into the banks, if it is not there; it is then the last to go.

        Raises InputError for a name that is not listed, for banks that do not fit in ``max_bytes`` and for a strength that takes an edit
        beyond the graph's float type; AdapterError or BundleError for an adapter that is damaged or does not fit the bundle. The bank is
        then as it was.
        """
        self._load(_plain(steering), rows=0)

    def copy(self, name: str, other: str) -> str:
        """Loads the adapter once more under another name, with slots of its own; the other name. Raises what ``load`` raises."""
        listed, edits = self._known(name), read_edits(self.bundle, self._known(name))
        with self._lock:
            if check_adapter_name(other) in self._listed:
                raise InputError(f"an adapter called {other} is listed already; choose another name for the copy")
            self._put(other, *edits)
            self._listed[other] = replace(listed, name=other)
        return other

    def evict(self, name: str) -> None:
        """Frees the adapter's slots, of every strength, for others. Raises InputError where it is not resident, or steers a row."""
        with self._lock:
            mine = self._all_of(name)
            if rows := self.live_rows(name):
                raise InputError(f"adapter {name} steers {count(rows, 'live row')}; release those first")
            for each in mine:
                self._drop(each)

    def remove(self, name: str) -> None:
        """Evicts an adapter that was added or scanned, and no longer lists it; its files stay. Raises InputError."""
        with self._lock:
            if self._known(name).folder is None:
                raise InputError(
                    f"adapter {name} is the bundle's own; take it out with `reft-export add {self.bundle.folder} --remove {name}`"
                )
            if self._strengths(name):
                self.evict(name)
            del self._listed[name]

    # --- for rows and sessions ---

    def pin(self, steering: Steering | None) -> np.ndarray:
        """The numbers of the rule [7] of a row that the adapter steers, loaded if need be, and resident until ``unpin``."""
        if steering is None:
            return BASE_RULE
        return self._load(_plain(steering), rows=1).rule

    def explicit_slots(self, steering: Steering | None) -> ExplicitSlots | None:
        """Of a row that the resident adapter steers; None where the graph computes its slots."""
        if steering is None:
            return None
        with self._lock:
            return self._resident(_plain(steering)).explicit

    def load_unmarked(self, steering: Steering) -> None:
        """``load``, and InputError where the adapter edits the tokens that prompts mark: for those who hand no marks in."""
        # The resident that was loaded is asked: by now another thread may have evicted it.
        explicit = self._load(_plain(steering), rows=0).explicit
        if explicit is not None and needs_marks(explicit.where):
            raise InputError(f"adapter {parts_of(_plain(steering))[0]}: {UNMARKED}")

    def load_number(self, steering: Steering) -> int:
        """Which load the resident adapter's edits came with: another one may have brought others."""
        with self._lock:
            return self._resident(_plain(steering)).number

    def live_rows(self, name: str) -> int:
        """Rows that an adapter steers, at whatever strength, of all batches."""
        with self._lock:
            return sum(self._residents[key].rows for key in self._strengths(name))

    def unpin(self, steering: Steering | None) -> None:
        """One row less that the adapter steers."""
        if steering is not None:
            with self._lock:
                key = _plain(steering)
                self._residents[key].rows -= 1
                self._residents.move_to_end(key)
                self._forget_strengths(key)

    # --- inside ---

    def _known(self, name: str) -> ListedAdapter:
        if name not in self._listed:
            shown = ", ".join(list(self._listed)[:8]) or "none"
            more = f" and {len(self._listed) - 8} more" if len(self._listed) > 8 else ""
            raise InputError(f"no adapter {name!r} is listed; known: {shown}{more}")
        return self._listed[name]

    def _resident(self, key: Steering) -> _Resident:
        if key not in self._residents:
            self._known(parts_of(key)[0])
            raise InputError(f"adapter {key} is not resident; load it first")
        return self._residents[key]

    def _strengths(self, name: str) -> list[Steering]:
        """What is resident of an adapter, by itself and at other strengths; nothing where it is gone."""
        plain: list[Steering] = [name] if name in self._residents else []
        return plain + [key for key in self._scaled if key.adapter == name]

    def _all_of(self, name: str) -> list[Steering]:
        """The same; raises InputError where it is nothing."""
        mine = self._strengths(name)
        if not mine:
            self._resident(name)
        return mine

    def _forget_strengths(self, used: Steering) -> None:
        """``used`` was the last one: of those at a strength that steer no row, what was used longest ago goes."""
        if isinstance(used, Scaled):
            self._scaled.move_to_end(used)
            idle = [key for key in self._scaled if not self._residents[key].rows]
            for key in idle[:-IDLE_STRENGTHS]:
                self._drop(key)

    def _check_free(self, new: ListedAdapter) -> None:
        known = self._listed.get(new.name)
        if known is not None and known.folder != new.folder:
            where = self.bundle.folder if known.folder is None else known.folder
            raise InputError(f"two adapters are called {new.name}: {where} and {new.folder}; rename one's folder")

    def _load(self, key: Steering, *, rows: int) -> _Resident:
        name, _ = parts_of(key)
        with self._lock:
            listed, resident = self._known(name), key in self._residents
        # Not under the lock: the sessions' steps go on. Another thread may load, or replace, it meanwhile.
        read = None if resident else self._read(key, listed)
        with self._lock:
            if key not in self._residents:
                now = self._known(name)
                self._put(key, *(self._read(key, now) if read is None or now is not listed else read))
            self._residents.move_to_end(key)
            self._residents[key].rows += rows
            self._forget_strengths(key)
            return self._residents[key]

    def _read(self, key: Steering, listed: ListedAdapter) -> tuple[Edits, Positions, bool]:
        edits, where, tied = read_edits(self.bundle, listed)
        name, strength = parts_of(key)
        return {node: scaled_banks(node, arrays, strength, name) for node, arrays in edits.items()}, where, tied

    def _put(self, key: Steering, edits: Edits, where: Positions, tied: bool) -> None:
        ranks = {node: rank_of(node, arrays) for node, arrays in edits.items()}
        run = self._make_room(key, slot_count(where, tied=tied), ranks)
        replaced = self._grow()
        for node, stacked in self._nodes.items():
            stacked.write(run, edits.get(node))
        explicit = ExplicitSlots(where=where, tied=tied, first=run.start) if needs_slots(where) else None
        tensors = {} if isinstance(where, RuleSets) else where.tensors(tied=tied, first_slot=run.start)
        self._residents[key] = _Resident(
            slots=run,
            ranks=ranks,
            size=sum(array.nbytes for arrays in edits.values() for array in arrays),
            rule=np.array([tensors[number][0] for number in RULE], np.int64) if tensors else BASE_RULE,
            explicit=explicit,
            number=self.stacked.writes,
        )
        if isinstance(key, Scaled):
            self._scaled[key] = None
        arrays = self._arrays() if replaced else self.stacked.arrays
        self.stacked = StackedBanks(arrays=arrays, version=self.stacked.version + replaced, writes=self.stacked.writes + 1)

    def _make_room(self, key: Steering, groups: int, ranks: Mapping[EditNode, int]) -> range:
        """Slots for the adapter, taken; what was used longest ago is evicted for them. Raises InputError where that is not enough."""
        self._check_alone(key, groups, ranks)
        taken, gone = self._take(groups, ranks), []
        while self.max_bytes is not None and (needed := sum(node.least_size() for node in self._nodes.values())) > self.max_bytes:
            self._give_back(taken, ranks)
            oldest = next((other for other, resident in self._residents.items() if not resident.rows), None)
            if oldest is None:
                for other, resident in reversed(gone):
                    self._restore(other, resident)
                live = sum(bool(resident.rows) for resident in self._residents.values())
                remedy = f"{count(live, 'adapter')} of live rows cannot go: release rows, or allow more" if live else "allow more"
                raise BankFull(
                    f"adapter {key} does not fit in the bank: {needed:,} bytes are needed, max_bytes is {self.max_bytes:,}; {remedy}"
                )
            gone.append((oldest, self._drop(oldest)))
            taken = self._take(groups, ranks)
        return taken

    def _check_alone(self, key: Steering, groups: int, ranks: Mapping[EditNode, int]) -> None:
        alone = sum(self._nodes[node].size_alone(groups, rank) for node, rank in ranks.items())
        if self.max_bytes is not None and alone > self.max_bytes:
            raise InputError(f"adapter {key} alone takes {alone:,} bytes of the bank, and max_bytes is {self.max_bytes:,}; allow more")

    def _grow(self) -> bool:
        """Room in the arrays for what is taken; whether any was replaced."""
        replaced = [node.reserve() for node in self._nodes.values()]
        if self.max_bytes is not None and sum(node.size for node in self._nodes.values()) > self.max_bytes:
            replaced += [node.reserve(exactly=True) for node in self._nodes.values()]
        return any(replaced)

    def _arrays(self) -> dict[str, np.ndarray]:
        nodes = self._nodes.values()
        return {name: array for n in nodes for name, array in zip(n.node.bank_names, n.arrays, strict=True)}

    def _take(self, groups: int, ranks: Mapping[EditNode, int]) -> range:
        slots = self._slots.first_fit(groups)
        self._slots.take(slots)
        for node, rank in ranks.items():
            self._nodes[node].take(slots, rank)
        return slots

    def _give_back(self, slots: range, ranks: Mapping[EditNode, int]) -> None:
        self._slots.give_back(slots)
        for node, rank in ranks.items():
            self._nodes[node].give_back(slots, rank)

    def _drop(self, key: Steering) -> _Resident:
        resident = self._residents.pop(key)
        if isinstance(key, Scaled):
            del self._scaled[key]
        self._give_back(resident.slots, resident.ranks)
        return resident

    def _restore(self, key: Steering, resident: _Resident) -> None:
        """What ``_drop`` took: its edits are still in its slots."""
        self._slots.take(resident.slots)
        for node, rank in resident.ranks.items():
            self._nodes[node].take(resident.slots, rank)
        self._residents[key] = resident
        self._residents.move_to_end(key, last=False)
        if isinstance(key, Scaled):
            self._scaled[key] = None
            self._scaled.move_to_end(key, last=False)


def _plain(steering: Steering) -> Steering:
    """The same by the name alone at strength 1, which is the adapter itself."""
    return at_strength(*parts_of(steering))


def count(number: int, what: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
