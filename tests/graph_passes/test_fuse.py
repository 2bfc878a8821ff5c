"""Fusion levels: none leaves the graph alone, anything else is refused."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from small_decoders import small_decoder

from graph_passes.fold import fuse
from runtimes.errors import GraphError


def test_none_leaves_the_graph_as_it_is():
    model = small_decoder()
    before = ir.to_proto(model)
    fuse(model)
    assert ir.to_proto(model) == before


def test_other_levels_are_refused():
    with pytest.raises(GraphError, match="fusion level 'ort' does not exist, use one of: none"):
        fuse(small_decoder(), level="ort")
