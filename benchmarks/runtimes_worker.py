"""Runs files in the ONNX Runtime of this Python, which has NumPy besides and nothing else; one line of JSON for each.

Standard input: a JSON list of [path without its suffix, kernel library or ""].
"""

import json
import sys

import numpy as np
import onnxruntime as ort

for stem, library in json.load(sys.stdin):
    kept = np.load(stem + ".npz")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        if library:
            options.register_custom_ops_library(library)
        session = ort.InferenceSession(stem + ".onnx", options, providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: kept["x"]})[0]
        expected = kept["y"].astype(np.float64)
        deviation = float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))
        said: dict[str, float | str] = {"deviation": deviation if deviation == deviation else 1e300}
    except Exception as e:
        said = {"error": f"{type(e).__name__}: {e}"[-300:]}
    print(json.dumps(said), flush=True)
