"""The safetensors files of a checkpoint folder: which they are, and what their headers say. No torch, no data."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdeploy.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100 << 20
ELEMENT_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as it lies in a file: `dtype` is the header's word, `offset` counts bytes from the file's start."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


def find_weight_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """The weight files of `folder`, each with the tensor names that the index places in it (None without an index).

    Empty when the folder holds no weights. Raises CheckpointError for an index that cannot be read or that names a
    file that is not there, and for several files without an index.
    """
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: None}
    if (folder / INDEX_FILE).is_file():
        return _read_index(folder / INDEX_FILE)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise CheckpointError(
            f"{folder}: {len(files)} safetensors files but no {INDEX_FILE} that says which belong together; add it"
        )
    return dict.fromkeys(files)


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every stored tensor of `folder` by its stored name; reads only the headers. Empty when there are no weights.

    Raises CheckpointError naming the file when one is missing, truncated or not safetensors, when two files hold the
    same name, and when a file lacks a tensor that the index places in it.
    """
    stored: dict[str, StoredTensor] = {}
    for file, promised in find_weight_files(folder).items():
        tensors = _read_header(file)
        missing = sorted((promised or frozenset()) - tensors.keys())
        if missing:
            raise CheckpointError(f"{file}: lacks {missing[0]}, which {INDEX_FILE} says it holds; fetch both again")
        for name, tensor in tensors.items():
            if name in stored:
                raise CheckpointError(f"{file}: holds {name}, and so does {stored[name].file.name}; remove one of them")
            stored[name] = tensor
    return stored


def _read_index(path: Path) -> dict[Path, frozenset[str] | None]:
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path}: is not valid JSON: {exc}; fetch it again") from exc
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map; fetch it again")
    names_of: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(f"{path}: places {name} in {file_name!r}; it must be the name of a file beside it")
        names_of.setdefault(file_name, set()).add(name)
    for file_name, names in names_of.items():
        if not (path.parent / file_name).is_file():
            raise CheckpointError(
                f"{path.parent / file_name}: the file is missing; {path.name} places {len(names)} tensors in it, "
                f"the first is {min(names)}"
            )
    return {path.parent / file_name: frozenset(names) for file_name, names in sorted(names_of.items())}


def _read_header(file: Path) -> dict[str, StoredTensor]:
    file_bytes = file.stat().st_size
    with file.open("rb") as f:
        header_bytes = int.from_bytes(f.read(LENGTH_BYTES), "little")
        data_start = LENGTH_BYTES + header_bytes
        if not 2 <= header_bytes <= MAX_HEADER_BYTES:
            raise CheckpointError(f"{file}: is not a safetensors file: it says its header has {header_bytes} bytes")
        if data_start > file_bytes:
            raise CheckpointError(
                f"{file}: is truncated: its header alone needs {data_start} bytes, the file has {file_bytes}"
            )
        try:
            header = json.loads(f.read(header_bytes))
        except (ValueError, RecursionError) as exc:
            raise CheckpointError(f"{file}: its header is not valid JSON: {exc}; fetch it again") from exc
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is not a JSON object; fetch it again")
    header.pop("__metadata__", None)
    tensors = {name: _parse_entry(file, name, entry, data_start) for name, entry in header.items()}
    expected = max((t.offset + t.n_bytes for t in tensors.values()), default=data_start)
    if expected != file_bytes:
        what = "is truncated" if file_bytes < expected else "is longer than its header says"
        raise CheckpointError(f"{file}: {what}: expected {expected} bytes, found {file_bytes}; fetch it again")
    return tensors


def _parse_entry(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
            all(type(n) is int and n >= 0 for n in shape) and 0 <= begin <= end
        ):
            pass
        case _:
            raise CheckpointError(f"{file}: the header entry of {name} is malformed; fetch the file again")
    if dtype not in ELEMENT_BYTES:
        raise CheckpointError(f"{file}: {name} has dtype {dtype!r}; supported are {', '.join(sorted(ELEMENT_BYTES))}")
    n_bytes = math.prod(shape) * ELEMENT_BYTES[dtype]
    if end - begin != n_bytes:
        raise CheckpointError(
            f"{file}: {name} has {end - begin} bytes by its offsets, {n_bytes} by its shape {shape} and dtype {dtype}"
        )
    return StoredTensor(name, file, dtype, tuple(shape), data_start + begin, n_bytes)
