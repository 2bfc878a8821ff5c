"""What of an adapter can be refused by a bundle's records alone, before anything is copied or torch is loaded."""

from __future__ import annotations

from runtimes.artifacts.adapter_record import check_adapter_name
from runtimes.artifacts.bundle import Bundle
from runtimes.edits.adapter import Adapter
from runtimes.edits.op import EditNode
from runtimes.edits.same_base import comparable, require_same, require_same_size
from runtimes.errors import AdapterError, InputError

REMEDY = "use the base it was trained on"


def check_addition(bundle: Bundle, name: str, adapter: Adapter, *, accept_base: bool = False) -> None:
    """Raises AdapterError for an adapter of another base or size, with other labels or head, for edit nodes that the graph lacks, or
    trained on the weights of another bundle."""
    check_adapter_name(name)
    m, claim = bundle.manifest, f"adapter {name} was trained on"
    require_same_size(claim, adapter.base, str(bundle.folder), m.model.num_hidden_layers, m.model.hidden_size, REMEDY)
    if m.model.fingerprint and comparable(adapter.base, m.model):  # else the base tells, where it is given
        require_same(claim, adapter.base, f"{bundle.folder} was made from", m.model, REMEDY, accept=accept_base)
    if adapter.trained_on not in (None, bundle.digest):
        raise AdapterError(
            f"adapter {name} was trained on the weights of a bundle with digest {adapter.trained_on[:12]}, {bundle.folder} has "
            f"{bundle.digest[:12]}; train it on this one with --base"
        )
    _check_labels(bundle, name, adapter)
    check_nodes(bundle, name, adapter)


def check_known_base(bundle: Bundle, name: str, adapter: Adapter, *, accept_base: bool = False) -> None:
    """As ``check_addition``, where no base is there to ask: what the bundle records of its own has to tell.

    A bundle that was folded without its base records none; its adapters' bases do, and without any only the sizes tell.
    """
    m, claim = bundle.manifest, f"adapter {name} was trained on"
    if not m.model.fingerprint:
        for other in bundle.adapter_names:
            if other != name and comparable(adapter.base, base := bundle.adapter_record(other).base):
                require_same(claim, adapter.base, f"adapter {other} of {bundle.folder} on", base, REMEDY, accept=accept_base)
    elif not comparable(adapter.base, m.model):
        raise AdapterError(
            f"{claim} {adapter.base.name}, whose fingerprint is of another version than that of {bundle.folder}: whether it is the base of "
            "both shows with --model alone"
        )


def check_nodes(bundle: Bundle, name: str, adapter: Adapter) -> None:
    """Raises AdapterError, naming them all, where the graph lacks edit nodes that the adapter needs."""
    missing = sorted(set(adapter.nodes()) - set(bundle.nodes), key=lambda node: (node.site.layer, node.name))
    if not missing:
        return
    plain = all(node == EditNode(site=node.site) for node in missing)  # what --sites makes
    remedy = f" or with --sites '{';'.join(dict.fromkeys(str(node.site) for node in missing))}'" if plain else ""
    raise AdapterError(
        f"the graph of {bundle.folder} has no edit node {', '.join(node.name for node in missing)}, which adapter {name} needs; "
        f"`reft-export export` it with this adapter{remedy}"
    )


def check_free(bundle: Bundle, names: tuple[str, ...], *, force: bool) -> None:
    """Raises InputError where an adapter of the bundle has one of ``names`` and is not to be replaced."""
    if not force and (taken := [name for name in names if name in bundle.adapter_names]):
        raise InputError(f"{bundle.folder} has an adapter {taken[0]} already; pass --force to replace it, or rename the new one's folder")


def _check_labels(bundle: Bundle, name: str, adapter: Adapter) -> None:
    m = bundle.manifest
    if adapter.base.labels != m.labels:
        raise AdapterError(
            f"adapter {name} was trained on {adapter.base.name} with labels {', '.join(adapter.base.labels) or 'none'}; "
            f"{bundle.folder} has {', '.join(m.labels) or 'none'}; {REMEDY}"
        )
    if not adapter.head:
        return
    known = {source.parameter for source in m.head.values()}
    if not known:
        raise AdapterError(
            f"adapter {name} brings a head of its own, and the head of {bundle.folder} does not swap; export or fold it with an "
            "adapter that has one"
        )
    if other := sorted(known ^ set(adapter.head)):
        raise AdapterError(f"adapter {name} has a head of other parameters than {bundle.folder}, first {other[0]}; {REMEDY}")
