"""Which of our sites a pyvene component means.

A representation names its place as an abstract component of a layer (``block_output``), or as a path to a module of the model, with
the side it is hooked on (``model.layers[3].mlp.output``, or ``model.layers.3.mlp.output``). File names join all of it with ``.`` up to
pyvene 0.1.6, and have ``_`` in place of every ``.`` from 0.1.7 on.

Source: pyvene/models/modeling_utils.py, get_module_hook; pyvene/models/intervenable_base.py, _get_representation_key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from reft_export.eager.steering import decoder_layers, site_module
from runtimes.edits.edit import STREAMS, Site
from runtimes.errors import AdapterError, InputError

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the paths of the model it wraps; pyreft's README uses such paths."""

LAST_PROJECTIONS = {"attention_output": ("o_proj", "c_proj"), "mlp_output": ("down_proj", "c_proj")}
"""Submodules whose output their parent returns unchanged, but for dropout in training, in every family of transformers that calls
them so."""


class Place(NamedTuple):
    """A module's side: the site that it is, and whether the module lies inside another one that returns the same stream."""

    site: Site
    inner: bool = False


class ComponentSites:
    """The places of one base that can be edited, under every name that pyvene has for them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers = len(decoder_layers(model))
        self.by_path = dict(_paths(model))
        dotted = {re.sub(r"\[(\d{1,40})\]", r".\1", path): place for path, place in self.by_path.items()}
        self._by_key = {path.replace(".", "_"): place for path, place in (dotted | self.by_path).items()}

    def of_component(self, component: str, layer: object) -> Place:
        """Raises AdapterError for a component that is not one of the streams, and for a layer that the base does not have."""
        if "." not in component:
            return self._of_layer(component, layer)
        indexed = re.sub(r"\.(\d{1,40})(?=\.)", r"[\1]", component)
        for path in (indexed, indexed.removeprefix(PEFT_PREFIX)):
            if path in self.by_path:
                return self.by_path[path]
        self._check_index(indexed)
        raise AdapterError(f"component {component!r} is not a stream that can be edited; those are {self._known()}")

    def of_key(self, key: str) -> Place:
        """From a saved file's name: ``layer_3_comp_block_output_unit_pos_nunit_1``, ``comp_model_layers[3]_output_unit_pos_nunit_1``, or
        the same with a ``.`` at every joint."""
        if dotted := re.fullmatch(r"(?:layer\.(\d{1,40})\.)?comp\.(.+)\.unit\.pos\.nunit\.1", key):
            return self.of_component(dotted[2], 0 if dotted[1] is None else int(dotted[1]))
        match = re.fullmatch(r"(?:layer_(\d{1,40})_)?comp_(.+)_unit_pos_nunit_1", key)
        if not match:
            raise AdapterError(f"intervention {key!r} is not a position of one token (unit pos, one unit); nothing else can be imported")
        if match[1] is not None:
            return self._of_layer(match[2], int(match[1]))
        for path in (match[2], match[2].removeprefix(PEFT_PREFIX.replace(".", "_"))):
            if path in self._by_key:
                return self._by_key[path]
        self._check_index(match[2])
        raise AdapterError(f"component {match[2]!r} is not a stream that can be edited; those are {self._known()}")

    def _of_layer(self, component: str, layer: object) -> Place:
        if component not in STREAMS:
            raise AdapterError(f"component {component!r} is not a stream that can be edited; those are {self._known()}")
        if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
            raise AdapterError(f"layer {layer!r} of component {component} is not a number")
        self._check_layer(layer)
        return Place(Site(layer=layer, stream=component))

    def _check_index(self, component: str) -> None:
        """A path of the right form whose layer is out of range is that, rather than an unknown component."""
        for index in re.findall(r"\[(\d{1,40})\]", component):
            self._check_layer(int(index))

    def _check_layer(self, layer: int) -> None:
        if layer >= self.layers:
            raise AdapterError(
                f"layer {layer} does not exist in this base ({self.layers} layers, 0 to {self.layers - 1}); pass the base that the "
                "adapter was trained on"
            )

    def _known(self) -> str:
        return f"{', '.join(STREAMS)}, or paths such as {', '.join(path for path, place in self.by_path.items() if place.site.layer == 0)}"


def _paths(model: PreTrainedModel) -> Iterator[tuple[str, Place]]:
    names: dict[nn.Module, str] = {module: re.sub(r"\.(\d{1,40})(?=\.|$)", r"[\1]", name) for name, module in model.named_modules()}
    for layer in range(len(decoder_layers(model))):
        for stream in STREAMS:
            site = Site(layer=layer, stream=stream)
            try:
                module = site_module(model, site)
            except InputError:  # a family whose blocks have no such module
                continue
            yield f"{names[module]}.{'input' if stream == 'block_input' else 'output'}", Place(site)
            for name in LAST_PROJECTIONS.get(stream, ()):
                if isinstance(last := getattr(module, name, None), nn.Module):
                    yield f"{names[last]}.output", Place(site, inner=True)
