"""Runs in an environment that has onnxruntime and numpy only: op_in_other_onnxruntime.py LIBRARY FOLDER-OF-CASES."""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

library, folder = sys.argv[1], Path(sys.argv[2])


def session(name):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])


def load(name):
    with np.load(folder / f"{name}.npz") as arrays:
        return dict(arrays)


def error_of(function):
    try:
        function()
    except Exception as e:  # onnxruntime's exceptions share no base
        return str(e)
    return "no error"


def counts():
    values = (ctypes.c_int64 * 4)()
    ctypes.CDLL(library).reft_statistics(values, 1)
    return list(values)


for dtype in ("float32", "float16", "bfloat16"):
    for rank in (2, 3):
        name = f"{dtype}_{rank}"
        for case in (name, f"red_{name}"):
            np.save(folder / f"{case}_y.npy", session(case).run(None, load(case))[0])

chain = session("chain")
counts()
chain.run(None, load("chain"))
calls, in_place = counts()[:2]

feeds = {"h": np.zeros((2, 5, 8), np.float32), "slot": np.zeros(4, np.int32)}
feeds.update({"U": np.zeros((1, 2, 8), np.float32), "A": np.zeros((1, 2, 8), np.float32), "b": np.zeros((1, 2), np.float32)})
flat = {**feeds, "slot": np.zeros((2, 5), np.int64)}
plain = session("plain")
red_chain = session("red_chain")
counts()
red_chain.run(None, load("red_chain"))
red_calls, red_in_place = counts()[:2]
red_feeds = {"h": np.zeros((2, 5, 8), np.float32), "slot": np.zeros((2, 5), np.int32)}
red_feeds.update({"scale": np.ones((2, 8), np.float32), "bias": np.zeros((3, 8), np.float32)})
told = {
    "version": onnxruntime.__version__,
    "chain_calls": calls,
    "in_place": in_place,
    "red_chain_calls": red_calls,
    "red_in_place": red_in_place,
    "red_bad_shape": error_of(lambda: session("red_plain").run(None, red_feeds)),
    "bad_name": error_of(lambda: session("bad_name")),
    "bad_number": error_of(lambda: session("bad_number")),
    "bad_type": error_of(lambda: plain.run(None, flat)),
}
told["bad_shape"] = error_of(lambda: plain.run(None, {**feeds, "slot": np.zeros((4,), np.int32)}))
if "Invalid rank" in told["bad_shape"]:
    # onnxruntime looks at a graph input's declared rank before the op does; a wrong length gets through to it.
    told["bad_shape"] = error_of(lambda: plain.run(None, {**feeds, "slot": np.zeros((4, 1), np.int32)})).replace("[4, 1]", "[4]")
print(json.dumps(told))
