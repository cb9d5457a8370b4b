"""Exported encoders of one layer."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper


def save_onnx(
    path: Path, outputs: dict[str, int], *, size: Any = "S", batch: Any = "N", **metadata: str
) -> Path:
    """A model of 16 px patches whose output channels repeat the patch's first red value."""
    nodes, weights, infos = [], [], []
    for name, channels in outputs.items():
        kernel = np.zeros((channels, 3, 16, 16), np.float32)
        kernel[:, 0, 0, 0] = 1
        weights.append(onnx.numpy_helper.from_array(kernel, f"{name}_w"))
        nodes.append(helper.make_node("Conv", ["image", f"{name}_w"], [name], strides=[16, 16]))
        infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, channels, None, None]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, size, size])
    graph = helper.make_graph(nodes, "patches", [image], infos, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)
    return path
