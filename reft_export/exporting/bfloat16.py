"""bfloat16 arithmetic inside a graph of another float type: onnxruntime has no CPU kernels for it."""

from __future__ import annotations

import onnx_ir as ir

ARITHMETIC = ("Add", "Sub", "Mul", "Div")


def widen_bfloat16(graph: ir.Model) -> None:
    """Casts the operands of bfloat16 arithmetic to float32, and its result back. Falcon computes its ALiBi in bfloat16, whatever its dtype.

    The same to the bit: float32 has more than 2 * 8 + 2 bits of significand, so that rounding its result to bfloat16's 8 is what rounding
    the exact result would be.
    """
    for node in list(graph.graph):
        if node.domain or node.op_type not in ARITHMETIC or node.outputs[0].dtype != ir.DataType.BFLOAT16:
            continue
        result = node.outputs[0]
        for i, operand in enumerate(node.inputs):
            if operand is None:
                continue
            cast = ir.node("Cast", [operand], {"to": ir.DataType.FLOAT})
            cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, operand.shape
            graph.graph.insert_before(node, cast)
            node.replace_input_with(i, cast.outputs[0])
        back = ir.node("Cast", [result], {"to": ir.DataType.BFLOAT16})
        back.outputs[0].dtype, back.outputs[0].shape = ir.DataType.BFLOAT16, result.shape
        graph.graph.insert_after(node, back)
        ir.convenience.replace_all_uses_with(result, back.outputs[0])
        back.replace_input_with(0, result)
        result.dtype = ir.DataType.FLOAT
