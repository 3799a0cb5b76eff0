"""Files that the hub's tests serve and break."""
from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1}


def raw(header: str | dict, data: bytes | int = 0) -> bytes:
    """A safetensors file of any header, true or not, and so much data."""
    text = (header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))).encode()
    return len(text).to_bytes(8, "little") + text + (bytes(data) if isinstance(data, int) else data)


def safetensors(tensors: dict[str, Any] | None = None, dtype: str = "F32") -> bytes:
    """A safetensors file. A tensor is its shape, (dtype, shape) or (dtype, shape, bytes); without bytes it is zeros."""
    entries, parts, at = {}, [], 0
    for name, said in (tensors or {"w": [4]}).items():
        kind, shape, *data = (dtype, said) if isinstance(said, list) else said
        parts.append(data[0] if data else bytes(math.prod(shape) * WIDTHS[kind]))
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + len(parts[-1])]}
        at += len(parts[-1])
    return raw(entries, b"".join(parts))


def one(name: str = "w", size: int = 8, data: bytes | None = None) -> bytes:
    """A safetensors file of one tensor of bytes; no two neighbouring pieces of it are alike."""
    return safetensors({name: ("U8", [size], data or bytes(i % 251 for i in range(251)) * (size // 251) + bytes(range(size % 251)))})


def write(folder: Path, files: dict[str, Any]) -> Path:
    """Write files of bytes, text, or what becomes JSON; returns the folder."""
    for path, content in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, (bytes, str)) else json.dumps(content)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def gguf(size: int = 24) -> bytes:
    """A GGUF file without settings and tensors, with so many bytes."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(size - 24)


def onnx() -> bytes:
    """An ONNX file whose graph holds nothing."""
    return b"\x08\x08\x3a\x02\x12\x00"
