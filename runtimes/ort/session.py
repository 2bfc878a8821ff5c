"""Runs a bundle in onnxruntime: one session, adapters swapped per run.

A graph whose manifest says so has its KV cache written in place, in buffers of the session's (runtimes/kv_cache.py); any other graph
returns a longer cache at every step, which is kept as OrtValues.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar
from weakref import WeakSet

import numpy as np
import onnxruntime as ort

from runtimes.artifacts.artifact import StoredAdapter
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.manifest import DATA_FILE, GRAPH_FILE
from runtimes.artifacts.ort_adapter_file import Tensor, host_array, host_view, open_onnx_adapter
from runtimes.edits.op import EXPLICIT_SLOTS, FIRST_LOGIT, SLOT_INPUT
from runtimes.errors import BackendUnavailable, BundleError, GraphError, InputError, ReftError
from runtimes.in_place import Call, StepRequest, step_in_place
from runtimes.kv_cache import LEAST_CAPACITY, CachePast, CacheTensor, HostMemory, KvCache
from runtimes.machine import this_machine
from runtimes.native_library import find_op_library, library_name
from runtimes.ort.bound_cache import BoundCache, memory_of
from runtimes.ort.bound_rows import BoundRows
from runtimes.ort.graph_checks import check_adapter, check_graph
from runtimes.ort.row_pool import RowPool
from runtimes.precision import BFLOAT16, ELEMENT_TYPES, FLOAT_TYPES
from runtimes.rows import AdapterRows
from runtimes.session import ClosedAtEnd, Past, StepOutput, check_step, closed, step_inputs

A = TypeVar("A")

PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
FLOAT_INPUTS = ("session.qdq_matmulnbits_accuracy_level", "1")
"""onnxruntime turns DequantizeLinear + MatMul into MatMulNBits, by default at the level that quantizes activations, which the graph does
not say."""
NO_PAIRS = ("session.disable_quant_qdq", "1")
"""onnxruntime 1.31 turns the E4M3 pairs around a MatMul into MatMulIntegerToFloat, which takes no E4M3: the graph would not load."""
NO_PACKING = ("session.disable_prepacking", "1")
PAST = "past_key_values."
IN_PLACE = "in-place"
"""The manifest's word for a cache that a step can write in place."""
CACHE_TYPES = (*FLOAT_TYPES.values(), ELEMENT_TYPES["int8"])
MOST_THREADS = 1024
"""Far more ends the process: the system has no more to give, and onnxruntime does not ask."""
ERRORS_ONLY = 3
"""onnxruntime warns once per overridable initializer while a graph loads; ours are overridable on purpose."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OrtPast:
    """The KV cache after some steps. ``width``: columns so far, pads included; ``prompt_length`` [B] as given at the first step."""

    values: Mapping[str, ort.OrtValue]
    width: int
    prompt_length: np.ndarray


class OrtGraph(ClosedAtEnd):
    """One onnxruntime session over a bundle's graph, and the adapter that is active in it.

    ``kernel``: "fused" (the op library; BackendUnavailable without one), "function" (the body in the graph), None: fused where
    a library is found. ``library`` names one; by default the installed package's own. ``threads``: None leaves it to onnxruntime.
    ``mapped``: weights stay in their file, and the graph as it is; slower, and in memory that the system can take back.

    Raises BackendUnavailable for a provider, library or onnxruntime version that is not here, for edits in TensorRT's provider and for a
    graph with operators that the CPU provider has no kernel of, GraphError for a graph that does not load.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        adapter: str | None = None,
        library: Path | None = None,
        kernel: str | None = None,
        mapped: bool = False,
    ) -> None:
        self.bundle = bundle
        self.provider = provider
        self.threads = threads
        self.library = _library(kernel, library)
        self.adapter: str | None = None
        if provider not in PROVIDERS:
            raise InputError(f"provider {provider!r} is unknown; known: {', '.join(PROVIDERS)}")
        _check_edits_run(bundle, provider, self._other_than_tensorrt())
        session = _load(bundle, provider, threads, self.library, mapped=mapped)
        self._session: ort.InferenceSession | None = session
        self._inputs = {i.name: i for i in session.get_inputs()}
        self._outputs = [o.name for o in session.get_outputs()]
        self._check_contract()
        check_graph(bundle, session)
        self._in_place: tuple[str, ...] = ()
        """Outputs that lie in memory of their own, bound before the others."""
        self._taken = {*self._inputs, *(i.name for i in session.get_overridable_initializers())}
        # Off the CPU the cache must stay on the device, which takes bound outputs, and with those onnxruntime ignores an active
        # adapter without a word: there the adapter's tensors are bound as inputs. So it is where the cache is written in place.
        self._bound = provider != "cpu" or bundle.manifest.kv_cache == IN_PLACE
        self._device = "cpu" if provider == "cpu" else "cuda"
        self._active: dict[str, ort.LoraAdapter] = {}
        self._tensors: dict[str, ort.AdapterFormat] = {}
        self._run_options = ort.RunOptions()
        self._binding: ort.IOBinding | None = None
        self._placement: StoredAdapter | None = None
        self._bound_cache: BoundCache | None = None
        self._bound_rows: BoundRows | None = None
        self._caches: WeakSet[KvCache] = WeakSet()
        self.set_adapter(adapter)

    @property
    def kernel(self) -> str:
        return "fused" if self.library else "function"

    @abstractmethod
    def _check_contract(self) -> None:
        """Raises GraphError where the graph's inputs and outputs are not those of the task."""

    def _other_than_tensorrt(self) -> str:
        """The options that run edits on a GPU."""
        return "--provider cuda"

    def set_adapter(self, name: str | None) -> None:
        """Every later step is steered by this adapter of the bundle; None is the base. Loads each adapter once.

        A KV cache belongs to the adapter it was computed with: start a new one after a swap.
        """
        session, placement = self._open, None if name is None else self.bundle.adapter(name)
        run_options = ort.RunOptions()
        binding = session.io_binding() if self._bound else None
        if placement is not None and binding is not None:
            if placement.name not in self._tensors:
                self._tensors[placement.name] = self._read_adapter(placement.file)
            for bank, value in self._tensors[placement.name].get_parameters().items():
                binding.bind_ortvalue_input(bank, value)
        elif placement is not None:
            if placement.name not in self._active:
                self._read_adapter(placement.file)
                self._active[placement.name] = _load_adapter(placement.file, _load_active)
            run_options.add_active_adapter(self._active[placement.name])
        self.adapter, self._placement, self._run_options, self._binding = name, placement, run_options, binding
        self._bound_rows = None

    @property
    def rows(self) -> AdapterRows | None:
        """The adapters of each batch's rows; None where one steers them all."""
        return None if self._bound_rows is None else self._bound_rows.rows

    def set_rows(self, rows: AdapterRows) -> None:
        """Every later step has a batch of these ``rows``, each steered by its own adapter, which may change between two steps; until
        ``set_adapter``.

        A row's KV cache belongs to the adapter it was computed with: start a new one after a swap. Raises InputError for rows of another
        bundle's bank.
        """
        self._check_bank(rows)
        binding = self._open.io_binding()
        self.adapter, self._placement, self._run_options, self._binding = None, None, ort.RunOptions(), binding
        self._bound_rows = BoundRows(binding, rows, self._device)

    def _check_bank(self, rows: AdapterRows) -> None:
        if rows.bank.bundle.digest != self.bundle.digest or rows.bank.bundle.nodes != self.bundle.nodes:
            raise InputError(f"the rows are of a bank of {rows.bank.bundle.folder}; {self.bundle.folder} needs a bank of its own")

    def _check_rows(self, batch: int) -> None:
        """Raises InputError where adapters are set for another number of rows."""
        if self._bound_rows is not None:
            self._bound_rows.rows.check(batch)

    def _bind_rows(self, rows: range) -> None:
        """The next run is of these rows of the batch."""
        if self._bound_rows is not None:
            self._bound_rows.bind(rows)

    def _read_adapter(self, file: Path) -> ort.AdapterFormat:
        """Raises BundleError for a file that is no adapter of this graph."""
        read = _load_adapter(file, open_onnx_adapter)
        check_adapter(file, read.get_parameters(), self.bundle, self._open)
        return read

    def close(self) -> None:
        """onnxruntime frees its session, and what its adapters were read into, as soon as nothing refers to them."""
        self._session = self._binding = self._bound_cache = self._bound_rows = None
        self._run_options = ort.RunOptions()
        self._active.clear()
        self._tensors.clear()

    @property
    def _open(self) -> ort.InferenceSession:
        if self._session is None:
            raise closed(self.bundle)
        return self._session

    def _run(self, feeds: Mapping[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
        """Every output by name; raises ReftError with onnxruntime's own reason."""
        if self._binding is not None:
            return self._run_bound(self._binding, feeds, self._in_place)
        session = self._open
        with self._explained():
            values = session.run_with_ort_values(self._outputs, dict(feeds), self._run_options)
        return dict(zip(self._outputs, values, strict=True))

    def _run_bound(self, binding: ort.IOBinding, feeds: Mapping[str, ort.OrtValue], in_place: Sequence[str]) -> dict[str, ort.OrtValue]:
        """The same with what is bound; ``in_place``: outputs that were bound before, in memory of their own."""
        session = self._open
        with self._explained():
            for name, value in feeds.items():
                binding.bind_ortvalue_input(name, value)
            outputs = [name for name in self._outputs if name not in in_place]
            for name in outputs:
                binding.bind_output(name, "cpu" if name == "logits" else self._device)
            session.run_with_iobinding(binding)
            return dict(zip((*in_place, *outputs), binding.get_outputs(), strict=True))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # onnxruntime's own exceptions share no base
            steering = f" with adapter {self.adapter}" if self.adapter else ""
            raise ReftError(f"onnxruntime {ort.__version__} cannot run {self.bundle.graph_path}{steering}: {_last_line(e)}") from e


class OpenGraph(OrtGraph):
    """A graph that onnxruntime opened, whatever its inputs and outputs are; arguments as OrtGraph's."""

    def nodes(self) -> tuple[Sequence[ort.NodeArg], Sequence[ort.NodeArg], Sequence[ort.NodeArg]]:
        """Its inputs, the initializers that a feed overrides, and its outputs."""
        return self._open.get_inputs(), self._open.get_overridable_initializers(), self._open.get_outputs()

    def _check_contract(self) -> None:
        pass


class OrtSession(OrtGraph):
    """A decoder's session; arguments as OrtGraph's."""

    @property
    def takes_position_ids(self) -> bool:
        """Without this input the graph counts columns or masked tokens itself, and padding inside a row may not be right."""
        return "position_ids" in self._inputs

    def _check_contract(self) -> None:
        _check_contract(self.bundle, self._inputs, self._outputs)

    def _other_than_tensorrt(self) -> str:
        return f"--provider cuda, or build an engine: reft-export build {self.bundle.folder} --target tensorrt"

    @property
    def cuts_logits(self) -> bool:
        """Whether logits that ``last_logits`` leaves out are not computed at all."""
        return self.bundle.manifest.logits == "last" or FIRST_LOGIT in self._taken

    @property
    def writes_in_place(self) -> bool:
        """Whether a step writes its keys and values into the cache that it was given."""
        return self.bundle.manifest.kv_cache == IN_PLACE

    @cached_property
    def cache_tensors(self) -> tuple[CacheTensor, ...]:
        """Every layer's keys and values, as the graph takes them."""
        return tuple(_cache_tensor(node) for name, node in self._inputs.items() if name.startswith(PAST))

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

        ``prompt_length`` [B]: tokens of each row's whole prompt; needed at the first step where the prompt comes in several, and
        remembered in ``past``. Without it all of the first step is prompt. ``marks`` bool [B, P]: of an adapter at positions ``marked``
        which tokens of each prompt it edits, by their numbers; needed wherever a prompt's tokens come. ``position_ids`` [B, S]: by default
        a token's rank among its row's real tokens. ``last_logits``: logits of the last so many columns only; None is all that the graph
        returns. ``capacity``: tokens that a row will hold in the end, where the caller knows; a cache that is written in place then never
        grows.

        In place, a past is refused once a column of it has been overwritten; pads take no room, wherever they stand; logits at them are
        zeros, and ``last_logits`` are those of a row's last real tokens in this step.

        Raises InputError for shapes, token ids or lengths that do not fit, and for a cache that does not fit in memory.
        """
        ids, mask = np.asarray(input_ids, np.int64), np.asarray(attention_mask, np.int64)
        if past is not None and not isinstance(past, CachePast if self.writes_in_place else OrtPast):
            raise InputError("this KV cache is of another kind of session; feed the tokens again")
        before = 0 if past is None else past.width
        # In place pads are no columns of the cache, whatever the graph knows of positions.
        check_step(self.bundle.manifest.model, ids, mask, before, takes_position_ids=self.takes_position_ids or self.writes_in_place)
        batch = ids.shape[0]
        self._check_rows(batch)
        if prompt_length is None:
            prompt_length = mask.sum(1) if past is None else past.prompt_length
        prompt_length = np.broadcast_to(np.asarray(prompt_length, np.int64), (batch,))
        request = StepRequest(
            ids=ids,
            mask=mask,
            prompt_length=prompt_length,
            marks=None if marks is None else np.asarray(marks, bool),
            position_ids=None if position_ids is None else np.asarray(position_ids, np.int64),
            last=last_logits,
            only_last=self.bundle.manifest.logits == "last",
        )
        if isinstance(past, CachePast) or (past is None and self.writes_in_place):
            return self._step_in_place(request, past, capacity)
        return self._step_appended(request, past)

    def _feeds(
        self, request: StepRequest, first_logit: int, *, placement: StoredAdapter | None = None, explicit: np.ndarray | None = None
    ) -> dict[str, ort.OrtValue]:
        arrays = step_inputs(
            self._taken,
            request.ids,
            request.mask,
            request.prompt_length,
            placement=placement,
            marks=request.marks,
            position_ids=request.position_ids,
            last_logits=request.ids.shape[1] - first_logit,
        )
        if explicit is not None:
            arrays[EXPLICIT_SLOTS] = explicit
        return {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}

    def _own_feeds(self, request: StepRequest, first_logit: int, rows: range) -> dict[str, ort.OrtValue]:
        """Of these rows of a step of the session's own batch."""
        explicit = None if self.rows is None else _explicit(self.rows, rows, request)
        return self._feeds(request, first_logit, placement=self._placement, explicit=explicit)

    def _step_appended(self, request: StepRequest, past: OrtPast | None) -> StepOutput:
        """A step whose cache is a longer copy."""
        batch, width = request.ids.shape
        last = width if request.last is None else min(request.last, width)
        feeds = self._own_feeds(request, width - last, range(batch))
        feeds |= self._empty_past(batch) if past is None else past.values
        self._bind_rows(range(batch))
        outputs = self._run(feeds)
        cache = {tensor.name: outputs[tensor.output] for tensor in self.cache_tensors}
        new_past = OrtPast(values=cache, width=request.mask.shape[1], prompt_length=request.prompt_length)
        logits = host_view(outputs["logits"])[:, -last:].astype(np.float32)  # a copy of what is asked for, alone
        return StepOutput(logits=logits, past=new_past, outputs=outputs)

    def _step_in_place(self, request: StepRequest, past: CachePast | None, capacity: int | None) -> StepOutput:
        if past is None:
            limit = self.bundle.manifest.model.context_length
            columns = max(int(request.mask.sum(1).max()), min(LEAST_CAPACITY, limit) if capacity is None else capacity)
            cache = KvCache(self.cache_tensors, len(request.ids), columns, limit=limit, memory=memory_of(self._device))
            self._caches.add(cache)
        elif past.cache not in self._caches:
            raise InputError("this KV cache is of another session; feed the tokens again")
        else:
            cache = past.cache
        outputs: dict[str, ort.OrtValue] = {}

        def run(cache: KvCache, call: Call, first_logit: int) -> np.ndarray:
            # Of large logits two in turn would both be in memory: those of the call before go first.
            outputs.clear()
            self._bind_cache(cache, call.rows)
            rows = range(cache.rows)[call.rows]
            self._bind_rows(rows)
            outputs.update(self._run(self._own_feeds(call.request(request), first_logit, rows)))
            return host_view(outputs["logits"])

        logits, new_past = step_in_place(request, past, cache, run)
        own = {"logits", *self._in_place}
        return StepOutput(logits=logits, past=new_past, outputs={name: v for name, v in outputs.items() if name not in own})

    def open_pool(self, rows: AdapterRows | None, most: int, capacity: int) -> RowPool:
        """A KV cache of ``most`` rows of ``capacity`` columns, whose rows come and go; ``rows``: their adapters, None for bases alone.

        Its memory is taken as its columns are written. The session's own steps go on beside it.
        Raises InputError where the graph does not write its cache in place, and for rows of another bundle's bank.
        """
        if not self.writes_in_place:
            raise InputError(
                f"{self.bundle.folder} returns a longer KV cache at every step, and requests cannot join or leave a batch; export it "
                "with --target onnxruntime (docs/SUPPORT.md lists the families), or run static batches"
            )
        if self._device != "cpu":
            raise BackendUnavailable("rows of a KV cache on a GPU do not change places here; batch requests with --provider cpu")
        if rows is not None:
            self._check_bank(rows)
        limit = self.bundle.manifest.model.context_length
        cache = KvCache(self.cache_tensors, most, min(capacity, limit), limit=limit, memory=HostMemory(lazily=True))
        return RowPool(lambda *run: self.run_pool(*run), self._open.io_binding(), cache, rows)

    def run_pool(self, pool: RowPool, rows: range, request: StepRequest) -> np.ndarray:
        """Logits [n, L, V] of these rows' last L columns, ``request.last`` or 1, after a run of what ``pool`` has bound.

        A view, good until its next run.
        """
        last = request.last or 1
        explicit = None if pool.rows is None else _explicit(pool.rows, rows, request)
        outputs = self._run_bound(pool.binding, self._feeds(request, request.ids.shape[1] - last, explicit=explicit), pool.in_place)
        return host_view(outputs["logits"])[:, -last:]

    def _bind_cache(self, cache: KvCache, rows: slice) -> None:
        if self._binding is None:
            raise closed(self.bundle)
        if self._bound_cache is None or self._bound_cache.binding is not self._binding:  # a swap of adapters begins another
            self._bound_cache = BoundCache(self._binding, self._device)
        self._in_place = tuple(tensor.output for tensor in cache.tensors)
        self._bound_cache.bind(cache, range(cache.rows)[rows])

    def _empty_past(self, batch: int) -> dict[str, ort.OrtValue]:
        return {tensor.name: _empty(tensor, batch) for tensor in self.cache_tensors}


def _explicit(rows: AdapterRows, chosen: range, request: StepRequest) -> np.ndarray | None:
    """``AdapterRows.slots`` of a step."""
    return rows.slots(chosen, request.mask, request.ids.shape[1], request.prompt_length, request.marks)


def _library(kernel: str | None, library: Path | None) -> Path | None:
    if kernel not in (None, "fused", "function"):
        raise InputError(f"kernel {kernel!r} is unknown; known: fused, function")
    if kernel == "function":
        if library is not None:
            raise InputError(f"kernel 'function' runs without a library; leave out {library} or ask for the fused kernel")
        return None
    if library is not None and not Path(library).is_file():
        raise BackendUnavailable(f"op library {library} does not exist; leave it out to use the function in the graph")
    found = find_op_library() if library is None else Path(library)
    if kernel == "fused" and found is None:
        raise BackendUnavailable(
            f"the fused kernel needs {library_name()}, which this installation does not have; install a C++17 compiler and "
            "reinstall reft-export, or use the function kernel"
        )
    return found


def _load(bundle: Bundle, provider: str, threads: int | None, library: Path | None, *, mapped: bool) -> ort.InferenceSession:
    wanted = PROVIDERS[provider][0]
    if wanted not in ort.get_available_providers():
        raise BackendUnavailable(f"onnxruntime {ort.__version__} has no {wanted} here; {_install(provider)}")
    options = _session_options(bundle, threads, library, mapped=mapped)
    try:
        # Its own fallback prints a banner on stdout and tries again without the provider.
        session = ort.InferenceSession(str(bundle.graph_path), options, providers=list(PROVIDERS[provider]), enable_fallback=0)
    except Exception as e:  # onnxruntime's own exceptions share no base
        raise _not_loaded(bundle, provider, e) from None
    session.disable_fallback()
    # Where a provider's own libraries are missing, onnxruntime logs it and goes on without the provider.
    if session.get_providers()[0] != wanted:
        raise BackendUnavailable(
            f"{wanted} did not start, onnxruntime fell back to {session.get_providers()[0]}; check the driver, or {_install(provider)}"
        )
    return session


def _session_options(bundle: Bundle, threads: int | None, library: Path | None, *, mapped: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.add_session_config_entry(*FLOAT_INPUTS)
    if bundle.manifest.quantization is not None and bundle.manifest.quantization.scheme == "fp8":
        options.add_session_config_entry(*NO_PAIRS)
    if mapped:
        # Optimizers fold, transpose and widen weights into copies, kernels pack them, and the arena keeps what a step needed.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry(*NO_PACKING)
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            raise InputError(f"{threads} threads; 1 to {MOST_THREADS} are possible, and more than the machine has cores gain nothing")
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if library is not None:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as e:  # onnxruntime's own exceptions share no base
            raise BackendUnavailable(
                f"op library {library} does not load in onnxruntime {ort.__version__}: {_last_line(e)}; use the function kernel"
            ) from None
    return options


def _not_loaded(bundle: Bundle, provider: str, error: Exception) -> ReftError:
    """What onnxruntime's refusal of the graph means."""
    wanted = PROVIDERS[provider][0]
    if type(error) in (RuntimeError, ValueError):  # of the provider; what is wrong with a graph has classes of its own
        return BackendUnavailable(f"{wanted} did not start: {_last_line(error)}; check the driver, or {_install(provider)}")
    if type(error).__name__ == "NotImplemented" and provider == "cpu":
        if bundle.manifest.precision == "bf16":
            return BackendUnavailable(
                f"onnxruntime's CPU provider has no bfloat16 MatMul, which {bundle.graph_path} needs; run it on cuda, or export fp32"
            )
        return BackendUnavailable(
            f"onnxruntime {ort.__version__} has no kernel of its CPU provider for {bundle.graph_path} ({_last_line(error)}); run it on cuda"
        )
    if any((bundle.folder / name).is_symlink() for name in (GRAPH_FILE, DATA_FILE)) and "escapes" in str(error):
        return GraphError(
            f"{bundle.folder / DATA_FILE} is a link to elsewhere, which onnxruntime does not follow from {GRAPH_FILE}; copy what the links "
            f"lead to: cp -RL {bundle.folder} COPY"
        )
    q = bundle.manifest.quantization
    newer = "; an int8 KV cache needs a newer onnxruntime, 1.31 has it" if q is not None and q.cache == "int8" else ""
    return GraphError(f"{bundle.graph_path} does not load in onnxruntime {ort.__version__} on {wanted}: {_last_line(error)}{newer}")


def _check_edits_run(bundle: Bundle, provider: str, instead: str) -> None:
    """Raises BackendUnavailable, with what runs them ``instead``, where TensorRT's provider would run edits.

    TensorRT's parser takes an initializer that is also a graph input for a constant: banks, rules and heads of an adapter would be bound
    and never read, and the answer would be the base's. Until a GPU has shown parity, nothing with an edit runs there.
    """
    if provider != "tensorrt" or not (bundle.nodes or bundle.manifest.head):
        return
    raise BackendUnavailable(
        f"onnxruntime's TensorRT provider may freeze the edits of {bundle.folder} to those of the base, and answer unsteered; use {instead}"
    )


def _load_adapter(file: Path, load: Callable[[Path], A]) -> A:
    if not hasattr(ort, "LoraAdapter"):
        raise BackendUnavailable(f"onnxruntime {ort.__version__} cannot load adapters; pip install 'onnxruntime>=1.20'")
    try:
        return load(file)
    except (RuntimeError, UnicodeDecodeError) as e:  # names that are no UTF-8
        raise BundleError(f"{file} cannot be loaded as an adapter: {_last_line(e)}; export the bundle again") from None


def _load_active(file: Path) -> ort.LoraAdapter:
    adapter = ort.LoraAdapter()
    adapter.Load(str(file))
    return adapter


def _check_contract(bundle: Bundle, inputs: Mapping[str, ort.NodeArg], outputs: list[str]) -> None:
    ours = {"input_ids", "attention_mask", "position_ids", SLOT_INPUT}
    unknown = sorted(n for n in inputs if n not in ours and not n.startswith("past_key_values."))
    presents = {n.replace("past_key_values.", "present.", 1) for n in inputs if n.startswith("past_key_values.")}
    missing = sorted(({"input_ids", "attention_mask"} - set(inputs)) | (({"logits"} | presents) - set(outputs)))
    if unknown or missing:
        raise GraphError(
            f"{bundle.graph_path} is not a decoder with a KV cache as this runtime knows it: unknown inputs {unknown}, missing {missing}"
        )


def _cache_tensor(node: ort.NodeArg) -> CacheTensor:
    """Raises GraphError for a cache input that is not [batch, heads, past, dim] of a float type or int8, heads and dim fixed."""
    element = next((e for e in CACHE_TYPES if node.type == f"tensor({e.name})"), None)
    fixed = len(node.shape) == 4 and isinstance(node.shape[1], int) and isinstance(node.shape[3], int)
    if not fixed or element is None:
        raise GraphError(
            f"graph input {node.name} is {node.type} {node.shape}; expected float or int8 [batch, heads, past, dim], heads and dim fixed"
        )
    output = node.name.replace(PAST, "present.", 1)
    return CacheTensor(name=node.name, output=output, heads=node.shape[1], dim=node.shape[3], element=element)


def _empty(tensor: CacheTensor, batch: int) -> ort.OrtValue:
    """A cache of no tokens."""
    element = BFLOAT16 if tensor.element.name == "bfloat16" else tensor.element.dtype
    return ort.OrtValue.ortvalue_from_shape_and_type([batch, tensor.heads, 0, tensor.dim], element)


def to_float32(value: Tensor) -> np.ndarray:
    """A tensor in host memory as float32; float32 is not copied."""
    return np.asarray(host_array(value), np.float32)


def _install(provider: str) -> str:
    return this_machine().install_onnxruntime(provider)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
