"""The files of this folder, made by hand where the converters are installed (pip install litert-torch; pip install executorch).

    python tests/data/mobile/make.py tflite|pte
"""
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from net import Net, wrong  # noqa: E402


def tflite() -> None:
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe
    for name, net in (("net", Net().eval()), ("wrong", wrong())):
        litert_torch.convert(net, tuple(net.example_inputs(1).values())).export(str(HERE / f"{name}.tflite"))
    made = quantizer.Quantizer(str(HERE / "net.tflite"), recipe.dynamic_wi8_afp32()).quantize()
    made.export_model(str(HERE / "net-int8.tflite"), overwrite=True)


def pte() -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    batch = torch.export.Dim("batch", min=1, max=8)
    for name, net, free in (("net", Net().eval(), None), ("wrong", wrong(), None), ("net-free", Net().eval(), {"image": {0: batch}, "scale": {0: batch}})):
        program = torch.export.export(net, tuple(net.example_inputs(2 if free else 1).values()), dynamic_shapes=free)
        made = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        (HERE / f"{name}.pte").write_bytes(made.buffer)


{"tflite": tflite, "pte": pte}[sys.argv[1]]()
