"""What is refused before any work, each time with what to use in its place."""

from __future__ import annotations

import pytest

from calibration.selection import layer_of
from calibration.settings import SCHEMES, check_source, settings_for
from runtimes.errors import CalibrationError


@pytest.mark.parametrize("scheme", SCHEMES)
def test_defaults_fit_their_scheme(scheme) -> None:
    settings = settings_for(scheme)
    assert settings.bits == SCHEMES[scheme].bits[0]
    assert settings.quantizes_head == (SCHEMES[scheme].activations != "static")
    assert settings.symmetric and not settings_for("weight-only", method="k_quant").symmetric
    assert settings.embedding_bits == (8 if SCHEMES[scheme].runtime == "onnxruntime" else 0)


@pytest.mark.parametrize(
    ("scheme", "options", "method"),
    [
        ("weight-only", {}, "imatrix"),
        ("weight-only", {"bits": 8}, "rtn"),
        ("weight-only", {"symmetric": False}, "rtn"),
        ("weight-only", {"method": "rtn"}, "rtn"),
        ("qdq-int4", {}, "imatrix"),
        *((scheme, {}, "rtn") for scheme in SCHEMES if scheme not in ("weight-only", "qdq-int4")),
    ],
)
def test_scales_are_searched_where_that_pays(scheme, options, method) -> None:
    assert settings_for(scheme, **options).method == method


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("int5", {}, "known: weight-only"),
        ("dynamic", {"bits": 4}, "4 bits: --scheme weight-only, qdq-int4"),
        ("qdq-int4", {"bits": 8}, "8 bits: --scheme weight-only, dynamic"),
        ("weight-only", {"block_size": 48}, "power of two"),
        ("static", {"block_size": 32}, "takes no block size"),
        ("weight-only", {"accuracy_level": 3}, "1 is exact, 4 is fast"),
        ("weight-only", {"method": "hqq", "accuracy_level": 4}, "--method rtn"),
        ("weight-only", {"method": "hqq", "bits": 8}, "use --method rtn"),
        ("dynamic", {"accuracy_level": 4}, "has no accuracy level 4"),
        ("weight-only", {"method": "gptq"}, "--method hqq"),
        ("weight-only", {"method": "awq"}, "modelopt"),
        ("weight-only", {"method": "k_quant", "symmetric": True}, "leave out --symmetric"),
        ("weight-only", {"method": "imatrix", "bits": 8}, "not 8 bits; use --method rtn"),
        ("weight-only", {"method": "imatrix", "symmetric": False}, "not zero points; use --method rtn"),
        ("weight-only", {"method": "best"}, "known: imatrix, rtn, hqq, k_quant"),
        ("static", {"method": "hqq"}, "use rtn"),
        ("fp8", {"symmetric": False}, "--scheme weight-only"),
        ("qdq-int8", {"embeddings": 8}, "use an onnxruntime scheme"),
        ("weight-only", {"embeddings": 3}, "4 or 8 bits"),
    ],
)
def test_refusals_name_the_alternative(scheme, options, message) -> None:
    with pytest.raises(CalibrationError, match=message):
        settings_for(scheme, **options)


@pytest.mark.parametrize(
    ("scheme", "source", "message"),
    [
        ("weight-only", {"quantized": 4}, "quantized already"),
        ("static", {"precision": "fp16"}, r"starts from the fp32 one \(for fp16: qdq-int4\)"),
        ("weight-only", {"precision": "bf16"}, "for bf16: qdq-int4"),
        ("qdq-int4", {"opset": 19}, "--opset 20"),
        ("fp8", {"opset": 18}, "needs 19"),
    ],
)
def test_sources_that_do_not_fit(scheme, source, message) -> None:
    good = {"quantized": None, "precision": "fp32", "opset": 20, "where": "b"}
    check_source(settings_for(scheme), **good)
    with pytest.raises(CalibrationError, match=message):
        check_source(settings_for(scheme), **{**good, **source})


def test_layers_by_name() -> None:
    names = {"model.layers.12.mlp.up_proj.weight": 12, "transformer.h.0.attn.c_attn.weight": 0, "lm_head.weight": None}
    assert {name: layer_of(name) for name in names} == names
