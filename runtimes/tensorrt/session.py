"""Runs an engine in TensorRT or TensorRT-RTX: the KV cache stays on the device, adapters are swapped by rebinding their addresses.

A decode step is short, and much of it is the launching of its kernels, which a CUDA graph saves; but a graph replays fixed shapes and
addresses. So a step sees a cache of a bucket's width, W the next multiple of 64, whose pads are zeros under a mask of 0; position_ids and
slots count real tokens. Where the engine's steps give out their new columns alone (``cache`` of its manifest, column_cache.py):

    past     [B, heads, W, dim]    the cache, and pads behind it
    mask     [B, W + S]            1 over the cache, 0 over the pads, and the new columns'
    present  [B, heads, S, dim]    is copied to behind the cache, and the next step has the same shapes and addresses

An engine whose attention has a window, which counts columns, gives out the whole cache (device_cache.py). Without ``cuda_graphs`` a step
reads one side of a pair of buffers and writes the other, and shapes grow; with them

    past     [B, heads, W, dim]    pads, and the cache at the end: windows count columns from there
    mask     [B, W + 1]
    then     past = present[:, :, 1:]     the oldest pad falls out

One graph replays for every step of a bucket; at its end the cache is laid out in the next one. TensorRT wants one ordinary run after
every change of a shape, so a graph is captured on a binding's second use; and a graph is void when anything in its context is set anew,
so there is one at a time, and it goes before the context is touched. TensorRT-RTX captures graphs by itself (it swaps in kernels
compiled for a shape while it runs, which a graph captured outside would miss) and gains the same fixed shapes from the buckets.

Not yet run on a GPU: tested with a double of TensorRT and of CUDA whose engine runs the same derived graph in onnxruntime.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.artifacts.artifact import StoredAdapter
from runtimes.artifacts.engine import Engine
from runtimes.errors import InputError, ReftError
from runtimes.rows import AdapterRows
from runtimes.session import ClosedAtEnd, Past, StepOutput, check_step, closed, step_inputs
from runtimes.tensorrt.adapters import DeviceAdapters
from runtimes.tensorrt.column_cache import ColumnCache
from runtimes.tensorrt.cuda_device import CudaDevice
from runtimes.tensorrt.device_cache import CacheTensor, DeviceBuffers, DeviceCache
from runtimes.tensorrt.library import check_device, load_tensorrt, present_compute_capability, tensorrt_version
from runtimes.tensorrt.loaded_engine import Binding, BoundContext, LoadedEngine, host_dtype, size_of

PAST, PRESENT = "past_key_values.", "present."
BUCKET = 64
"""Columns. A wider bucket is laid out and captured less often, and computes more pads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DevicePast:
    """The KV cache after the step ``number`` of its session; it lives on the device until the next step."""

    owner: TensorRTSession
    number: int
    batch: int
    width: int
    prompt_length: np.ndarray


class TensorRTSession(ClosedAtEnd):
    """One engine on the first GPU. ``adapter``: None is the base, and in an engine with a frozen adapter that one.

    ``plugin`` replaces the plugin library that the engine carries. ``cuda_graphs``: see above; without, the cache grows step by step.
    Memory and engine are freed by ``close``, or at the end of a ``with``.

    Raises BackendUnavailable for an engine, a plugin or libraries that do not fit this device.
    """

    def __init__(self, engine: Engine, *, adapter: str | None = None, cuda_graphs: bool = True, plugin: Path | None = None) -> None:
        self.bundle = engine
        self.provider = engine.engine.target
        self.cuda_graphs = cuda_graphs
        self.adapter: str | None = None
        self._placement: StoredAdapter | None = None
        self._number = 0
        self._graph: object | None = None
        self._uses = 0
        self._contexts: dict[str, BoundContext] = {}
        tensorrt = load_tensorrt(self.provider)
        check_device(engine, tensorrt_version(tensorrt), present_compute_capability())
        self._device = CudaDevice()
        self._engine: LoadedEngine | None = None
        try:
            self._engine = loaded = LoadedEngine(engine, tensorrt, plugin)
            self._buffers = DeviceBuffers(self._device)
            kind = ColumnCache if engine.engine.cache == "columns" else DeviceCache
            self._cache: ColumnCache | DeviceCache = kind(self._device, self._buffers, _cache_tensors(loaded))
            self._adapters = DeviceAdapters(engine, loaded, self._device, self._buffers)
            runtime_graphs = cuda_graphs and self.provider == "tensorrt-rtx"
            for profile in ("prefill", "decode"):
                runtime = runtime_graphs and profile == "decode"
                self._contexts[profile] = loaded.context(profile, self._device, runtime_graphs=runtime)
            self.set_adapter(self._adapters.frozen if adapter is None else adapter)
        except BaseException:
            self.close()
            raise

    @property
    def kernel(self) -> str:
        return "expanded" if self.bundle.engine.plugin is None else "plugin"

    @property
    def takes_position_ids(self) -> bool:
        """Without this input the graph counts columns or masked tokens itself, and padding inside a row may not be right."""
        return "position_ids" in self._open.inputs

    @property
    def cuts_logits(self) -> bool:
        """Not in an engine, which computes what its bundle was exported with."""
        return self.bundle.manifest.logits == "last"

    @property
    def writes_in_place(self) -> bool:
        """Never: a step writes the other one of two buffers."""
        return False

    def set_adapter(self, name: str | None) -> None:
        """Every later step is steered by this adapter of the engine; None is the base. Uploads each adapter once.

        A KV cache belongs to the adapter it was computed with: start a new one after a swap. Raises InputError for an adapter that is
        larger than the engine was built for, or another than the one that is frozen into it.
        """
        if self._engine is None:
            raise closed(self.bundle)
        self._bank_shapes, self._bank_addresses = self._adapters.bind(name)
        self.adapter, self._placement = name, None if name is None else self.bundle.adapter(name)

    def set_rows(self, rows: AdapterRows) -> None:
        """Raises InputError: an engine's rows share one adapter."""
        raise InputError(
            f"{self.bundle.folder} is an engine, whose rows share one adapter; run rows that differ on the bundle that it was built from"
        )

    def step(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        *,
        past: Past | None = None,
        prompt_length: np.ndarray | None = None,
        marks: np.ndarray | None = None,
        position_ids: np.ndarray | None = None,
        last_logits: int | None = None,
        capacity: int | None = None,
    ) -> StepOutput:
        """Logits of S new tokens after ``past``. input_ids [B, S]; attention_mask [B, past width + S], 1 real, 0 pad.

        Arguments as in OrtSession.step (``capacity`` is that of the engine, whatever is asked for); but a ``past`` is good for one more
        step only, the next one: its memory is used again. Raises InputError for shapes, token ids or lengths that do not fit the model or
        the engine, and for an older ``past``.
        """
        taken = self._open.inputs
        if past is not None and not isinstance(past, DevicePast):
            raise InputError("this KV cache is of another kind of session; feed the tokens again")
        ids, mask = np.asarray(input_ids, np.int64), np.asarray(attention_mask, np.int64)
        model = self.bundle.manifest.model
        check_step(model, ids, mask, 0 if past is None else past.width, takes_position_ids=self.takes_position_ids)
        batch, added = ids.shape
        if past is not None:
            self._check_past(past, batch)
        if prompt_length is None:
            prompt_length = mask.sum(1) if past is None else past.prompt_length
        prompt_length = np.broadcast_to(np.asarray(prompt_length, np.int64), (batch,))
        arrays = step_inputs(taken, ids, mask, prompt_length, placement=self._placement, marks=marks, position_ids=position_ids)
        if past is not None and added == 1:
            logits = self._decode(arrays, last_logits)
        else:
            logits = self._prefill(arrays, past, last_logits)
        new_past = DevicePast(owner=self, number=self._number, batch=batch, width=mask.shape[1], prompt_length=prompt_length)
        return StepOutput(logits=logits, past=new_past)

    def close(self) -> None:
        """Frees the graph, the contexts, the engine and all device memory, in that order; once."""
        if self._graph is not None:
            self._device.free_graph(self._graph)
            self._graph = None
        for context in self._contexts.values():
            context.close()
        self._contexts.clear()
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._device.close()

    @property
    def _open(self) -> LoadedEngine:
        if self._engine is None:
            raise closed(self.bundle)
        return self._engine

    def _check_past(self, past: DevicePast, batch: int) -> None:
        if past.owner is not self or past.number != self._number:
            raise InputError(
                "this KV cache is no longer on the device: a TensorRT session keeps that of its newest step only; feed the tokens again"
            )
        if past.batch != batch:
            raise InputError(f"the KV cache has {past.batch} rows, the new tokens {batch}; a row cannot join or leave")

    def _prefill(self, arrays: Mapping[str, np.ndarray], past: DevicePast | None, last_logits: int | None) -> np.ndarray:
        batch, added = arrays["input_ids"].shape
        before = 0 if past is None else past.width
        self._check_limits("prefill", arrays, batch, before)
        self._number += 1
        if past is None:
            self._cache.start(batch)
        if isinstance(self._cache, ColumnCache):
            return self._append(self._cache, "prefill", arrays, added, last_logits)
        return self._grow(self._cache, "prefill", arrays, added, last_logits)

    def _decode(self, arrays: Mapping[str, np.ndarray], last_logits: int | None) -> np.ndarray:
        self._check_limits("decode", arrays, self._cache.batch, self._cache.width)
        self._number += 1
        if isinstance(self._cache, ColumnCache):
            return self._append(self._cache, "decode", arrays, 1, last_logits)
        # A graph that counts columns itself would count the pads of a bucket.
        if not self.cuda_graphs or not self.takes_position_ids:
            return self._grow(self._cache, "decode", arrays, 1, last_logits)
        return self._shift(self._cache, arrays, last_logits)

    def _append(
        self, cache: ColumnCache, profile: str, arrays: Mapping[str, np.ndarray], added: int, last_logits: int | None
    ) -> np.ndarray:
        """A step whose new columns are written behind the cache."""
        cache.lay_out(self._bucket(cache.width))
        mask, pads = arrays["attention_mask"], np.zeros((cache.batch, cache.columns - cache.width), arrays["attention_mask"].dtype)
        mask = np.concatenate([mask[:, : cache.width], pads, mask[:, cache.width :]], 1)
        binding, context = self._binding({**arrays, "attention_mask": mask}, added), self._contexts[profile]
        if profile == "decode":
            self._replay(context, binding, context.enqueue)
        else:
            context.bind(binding)
            context.enqueue()
        cache.append(added, self._bucket(cache.width + added))
        return self._logits(binding, last_logits)

    def _shift(self, cache: DeviceCache, arrays: Mapping[str, np.ndarray], last_logits: int | None) -> np.ndarray:
        """A decode step whose oldest pad falls out."""
        cache.lay_out(self._bucket(cache.width))
        mask = np.pad(arrays["attention_mask"], [(0, 0), (cache.pads, 0)])
        binding, context = self._binding({**arrays, "attention_mask": mask}, 1), self._contexts["decode"]

        def work() -> None:
            context.enqueue()
            cache.shift()

        self._replay(context, binding, work)
        logits = self._logits(binding, last_logits)
        cache.shifted()
        return logits

    def _grow(self, cache: DeviceCache, profile: str, arrays: Mapping[str, np.ndarray], added: int, last_logits: int | None) -> np.ndarray:
        """A step whose cache is as wide as it is, and wider after it."""
        cache.lay_out(cache.width)
        context = self._contexts[profile]
        binding = self._binding(arrays, added)
        context.bind(binding)
        context.enqueue()
        logits = self._logits(binding, last_logits)
        cache.turn(added)
        return logits

    def _replay(self, context: BoundContext, binding: Binding, work: Callable[[], None]) -> None:
        """``work`` of a decode step on ``binding``: queued as such at first, from a graph after that."""
        if not context.has(binding):
            self._drop_graph()
            context.bind(binding)
        self._uses += 1
        if self.provider == "tensorrt-rtx" or self._uses == 1 or not self.cuda_graphs:
            work()
            return
        if self._graph is None:
            try:
                self._graph = self._device.capture(work)
            except ReftError as e:
                warnings.warn(f"decoding without CUDA graphs, which this engine does not let capture: {e}", RuntimeWarning, stacklevel=2)
                self.cuda_graphs = False
                work()
                return
        self._device.launch(self._graph)

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._device.free_graph(self._graph)
        self._graph, self._uses = None, 0

    def _bucket(self, width: int) -> int:
        """The columns that a cache of ``width`` is laid out in: the next multiple of BUCKET, within what the decode profile takes."""
        ranges = self._open.profile("decode").shapes
        limit = min(ranges[PAST + name].max[2] for name in self._cache.shapes())
        return max(min(-(-width // BUCKET) * BUCKET, limit), width)

    def _check_limits(self, profile: str, arrays: Mapping[str, np.ndarray], batch: int, before: int) -> None:
        past = {PAST + name: (batch, shape[1], before, shape[3]) for name, shape in self._cache.shapes().items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        # The cache first: a mask that is too wide says the same of it less clearly.
        self._open.check_shapes(profile, {"input_ids": shapes["input_ids"], **past, **shapes})

    def _binding(self, arrays: Mapping[str, np.ndarray], added: int) -> Binding:
        """Uploads ``arrays``, and reserves memory for what a step of ``added`` columns writes."""
        inputs = {PAST + name: shape for name, shape in self._cache.shapes().items()} | self._bank_shapes
        addresses = {PAST + name: address for name, address in self._cache.past_addresses().items()} | self._bank_addresses
        addresses |= {PRESENT + name: address for name, address in self._cache.present_addresses(added).items()}
        for name, array in arrays.items():
            record = self._open.inputs[name]
            inputs[name] = array.shape
            addresses[name] = self._buffers.reserve(name, size_of(array.shape, record))
            self._device.copy_to_device(addresses[name], array.astype(host_dtype(record)))
        columns = 1 if self.bundle.manifest.logits == "last" else added
        logits = (self._cache.batch, columns, self.bundle.manifest.model.vocab_size)
        addresses["logits"] = self._buffers.reserve("logits", size_of(logits, self._open.outputs["logits"]))
        outputs = {"logits": logits, **{PRESENT + name: shape for name, shape in self._cache.new_shapes(added).items()}}
        return Binding(inputs=inputs, outputs=outputs, addresses=addresses)

    def _logits(self, binding: Binding, last: int | None) -> np.ndarray:
        """float32 [B, columns, V] of the step under way, of which this waits for the end."""
        record = self._open.outputs["logits"]
        batch, columns, vocabulary = binding.outputs["logits"]
        kept = columns if last is None else min(last, columns)
        logits = np.empty((batch, kept, vocabulary), host_dtype(record))
        row = size_of((columns, vocabulary), record)
        skipped = size_of((columns - kept, vocabulary), record)
        for i in range(batch):
            self._device.copy_to_host(logits[i], binding.addresses["logits"] + i * row + skipped)
        self._device.synchronize()
        return logits.astype(np.float32, copy=False)


def _cache_tensors(engine: LoadedEngine) -> tuple[CacheTensor, ...]:
    """The KV cache's tensors; raises ReftError where an input [B, heads, past, dim] has no output to go with it."""
    tensors = []
    for name, record in engine.inputs.items():
        if not name.startswith(PAST):
            continue
        present = engine.outputs.get(PRESENT + name.removeprefix(PAST))
        fixed = len(record.shape) == 4 and isinstance(record.shape[1], int) and isinstance(record.shape[3], int)
        if present is None or present.dtype != record.dtype or not fixed:
            raise ReftError(
                f"{engine.folder}: {name} is {record.dtype} {list(record.shape)}; expected a [batch, heads, past, dim] with heads and dim "
                f"fixed, and an output {PRESENT}{name.removeprefix(PAST)} like it; build it again: {engine.manifest.rebuild}"
            )
        heads, dim = int(record.shape[1]), int(record.shape[3])
        itemsize = host_dtype(record).itemsize
        tensors.append(CacheTensor(name=name.removeprefix(PAST), heads=heads, dim=dim, itemsize=itemsize))
    return tuple(tensors)
