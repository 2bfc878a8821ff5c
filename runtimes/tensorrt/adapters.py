"""The adapters of an engine in device memory: each is uploaded once, and steers by being bound.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from runtimes.artifacts.engine import Engine
from runtimes.edits.op import PROMPT_LENGTH, RULE_DEFAULTS, SLOT_INPUT
from runtimes.errors import BundleError, InputError
from runtimes.tensorrt.cuda_device import CudaDevice
from runtimes.tensorrt.device_cache import DeviceBuffers
from runtimes.tensorrt.loaded_engine import LoadedEngine, host_dtype

FROZEN_BASE = "base"
"""EngineManifest.frozen of an engine without any edit."""

Bindings = tuple[dict[str, tuple[int, ...]], dict[str, int]]
"""Shapes and addresses by input name."""


class DeviceAdapters:
    """Every bank and rule that the engine takes as an input, one set of buffers per adapter that was used, and one of the base:
    banks of no edit, N = r = 1, and a rule that edits nothing."""

    def __init__(self, engine: Engine, loaded: LoadedEngine, device: CudaDevice, buffers: DeviceBuffers) -> None:
        self._engine = engine
        self._loaded = loaded
        self._device = device
        self._buffers = buffers
        self._no_edit = {name: bank.no_edit for node in engine.nodes for name, bank in zip(node.bank_names, node.spec.banks, strict=True)}
        self._names = [name for name in loaded.inputs if name in self._no_edit or (name in RULE_DEFAULTS and name != PROMPT_LENGTH)]
        self._bound: dict[str | None, Bindings] = {}

    @property
    def frozen(self) -> str | None:
        """The adapter that is part of the engine; None where there is none."""
        frozen = self._engine.engine.frozen
        return None if frozen == FROZEN_BASE else frozen

    def bind(self, name: str | None) -> Bindings:
        """Where an adapter's banks and rule lie, and their shapes; uploads them at first.

        Raises InputError for an adapter that is larger than the engine was built for or not the frozen one, BundleError for a file
        that does not fit the engine.
        """
        self._check_frozen(name)
        if name not in self._bound:
            self._bound[name] = self._upload(name)
        return self._bound[name]

    def _check_frozen(self, name: str | None) -> None:
        frozen = self._engine.engine.frozen
        # With slots of the session's making, no slot at all is the base, whatever is frozen.
        if frozen is None or name == self.frozen or (name is None and SLOT_INPUT in self._loaded.inputs):
            return
        asked = "runs without an adapter" if name is None else f"takes adapter {name!r}"
        has = f"adapter {frozen!r} is frozen into it" if self.frozen else "it was frozen without any"
        use = f"use -a {frozen}, or " if self.frozen else ""
        raise InputError(f"{self._engine.folder} never {asked}: {has}; {use}build it without --freeze, which keeps adapters apart")

    def _upload(self, name: str | None) -> Bindings:
        tensors = self._base() if name is None else self._read(name)
        shapes = {bank: tensor.shape for bank, tensor in tensors.items()}
        for profile in self._loaded.manifest.profiles:
            self._loaded.check_shapes(profile.name, shapes)
        addresses = {}
        for bank, tensor in tensors.items():
            addresses[bank] = self._buffers.reserve(f"adapter {name or ''}/{bank}", tensor.nbytes)
            self._device.copy_to_device(addresses[bank], tensor)
        self._device.synchronize()
        return shapes, addresses

    def _base(self) -> dict[str, np.ndarray]:
        tensors = {}
        for name in self._names:
            record = self._loaded.inputs[name]
            if name in RULE_DEFAULTS:
                tensors[name] = np.array([RULE_DEFAULTS[name]], host_dtype(record))
            else:
                shape = [dim if isinstance(dim, int) else 1 for dim in record.shape]
                tensors[name] = np.full(shape, self._no_edit[name], host_dtype(record))
        return tensors

    def _read(self, name: str) -> Mapping[str, np.ndarray]:
        path = self._engine.adapter(name).file
        tensors = self._engine.adapter_tensors(name)
        if different := sorted(set(tensors) ^ set(self._names)):
            has, lacks = ("the adapter", "the engine") if different[0] in tensors else ("the engine", "the adapter")
            raise BundleError(f"{path}: {has} has {different[0]}, {lacks} does not ({len(different)} such names); build the engine again")
        for bank, tensor in tensors.items():
            record = self._loaded.inputs[bank]
            dims = zip(record.shape, tensor.shape, strict=True) if len(record.shape) == tensor.ndim else [(0, 1)]
            if tensor.dtype != host_dtype(record) or any(isinstance(want, int) and want != got for want, got in dims):
                raise BundleError(
                    f"{path}: {bank} is {tensor.dtype} {list(tensor.shape)}, the engine takes {record.dtype} {list(record.shape)}; "
                    "build the engine again"
                )
        return tensors
