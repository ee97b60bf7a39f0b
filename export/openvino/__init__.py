"""OpenVINO: models in its own format, an .xml file with the weights in a .bin file beside it.

target.py     what OpenVINO takes, and this folder to everybody else
options.py    what a user may ask for
api.py        to_openvino
medium.py     the file: from the ONNX model that the rest of the exporter makes, read by OpenVINO's own frontend
runtime.py    runs one, and its errors in one line
graph.py      what is in a file, and what OpenVINO makes of it
original.py   the model as OpenVINO converts it itself
"""
