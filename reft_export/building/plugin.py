"""The library of TensorRT plugins that an engine carries: which one, and whether it has what the graph and the GPUs need."""

from __future__ import annotations

from pathlib import Path

from graph_passes.insert import is_edit
from graph_passes.tensorrt_graph import EngineGraph
from reft_export.building.settings import BuildSettings
from runtimes.errors import EngineError, InputError
from runtimes.native_library import find_plugin_library, plugin_details

SELF_REGISTERING = ("libreft_trt_autoload", "libreft_trt_edgellm")
"""The plugin's libraries that are none without their neighbour."""


def choose_plugin(settings: BuildSettings, notes: list[str]) -> Path | None:
    if not settings.use_plugin:
        notes.append("no plugin: the edit is expanded into TensorRT's own layers, which cost more than one small kernel per edit")
        return None
    if settings.plugin is not None:
        if not settings.plugin.is_file():
            raise InputError(f"--plugin {settings.plugin} is not a file; name the plugin library libreft_trt.so")
        if settings.plugin.name.startswith(SELF_REGISTERING):
            raise InputError(
                f"--plugin {settings.plugin} is for hosts that only open a library, and needs libreft_trt.so beside it, while an engine "
                "carries one library; name libreft_trt.so itself"
            )
        return settings.plugin.absolute()
    found = find_plugin_library()
    if found is None:
        notes.append(
            "the plugin library was not found: the edit is expanded into TensorRT's own layers, which cost more than one small kernel "
            "per edit; `reft-export doctor` says how to build it"
        )
    return found


def check_kernels(plugin: Path, capabilities: tuple[str, ...]) -> None:
    """Raises EngineError for a GPU that the plugin has no kernel for: the engine would build, and fail at its first step."""
    try:
        _, architectures = plugin_details(plugin)
    except OSError:
        return  # the builder says why it does not load
    compiled = [divmod(int(name), 10) for name in architectures if name.isdigit()]
    for capability in capabilities:
        gpu = tuple(map(int, capability.split(".")))
        # A kernel runs on later GPUs of its major version; the newest is there as PTX too, which every later GPU compiles.
        if compiled and gpu < compiled[-1] and not any(gpu[0] == major and gpu[1] >= minor for major, minor in compiled):
            raise EngineError(
                f"the plugin {plugin} has kernels for sm {', '.join(architectures)}, and none for compute capability {capability}; build "
                f"it with -DREFT_CUDA_ARCHITECTURES={capability.replace('.', '')} (`reft-export doctor` has the line), or pass --no-plugin"
            )


def check_ops(plugin: Path, graph: EngineGraph) -> None:
    """Raises EngineError for an edit that the plugin does not have; the parser would only say that it has no importer for it."""
    try:
        version, _ = plugin_details(plugin)
    except OSError:
        return  # the builder says why it does not load
    has = {part.split()[0] for part in version.split(",")}
    if lacks := sorted({node.op_type for node in graph.model.graph if is_edit(node)} - has):
        raise EngineError(
            f"the plugin {plugin} has {version}, and no {lacks[0]}, which the graph needs; compile it again (`reft-export doctor` has the "
            "line), or pass --no-plugin"
        )
