"""A checkpoint folder as one set of canonical tensors, whatever layout its files have.

Opening reads headers only. A read touches just the rows it needs: a large one returns a tensor that lies in a mapping
of its own, which goes when the tensor does; so what has been copied to its place leaves nothing resident, and there is
nothing to close. Mappings are private: writing into such a tensor never reaches the file.
"""

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from fastdeploy.config.model_shape import has_tied_embeddings, read_config
from fastdeploy.errors import CheckpointError
from fastdeploy.kernels.weight_formats import FP8_BLOCK
from fastdeploy.models.dequantize import DEFAULT_BLOCK, dequantise_blocks, read_block_size
from fastdeploy.models.layouts import Layout, Origin, detect_layout, find_origins
from fastdeploy.models.weight_files import StoredTensor, read_headers

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
PADDLE_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({**DTYPES, "U16": torch.bfloat16})
CODE_DTYPES = frozenset({"F8_E4M3", "I8", "U8"})  # words under which FP8 codes are stored

# From here on mapping a tensor is faster than reading it into new memory; below it is slower. Every mapping also holds
# a file descriptor for as long as its tensor lives, which a model of thousands of small tensors could not afford.
MAP_FROM_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorSource:
    """One canonical tensor that has not been read yet.

    `dtype` is that of the tensors `read` returns: the stored one, float32 for block-wise FP8.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    _stored: StoredTensor
    _stored_dtype: torch.dtype
    _origin: Origin
    _scales: "TensorSource | None" = None
    _block: tuple[int, int] = (1, 1)

    @property
    def file(self) -> Path:
        """The file that holds it."""
        return self._stored.file

    @property
    def stored_name(self) -> str:
        """Its name, or that of the tensor it is a part of, in the file."""
        return self._stored.name

    def read(self, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """The tensor or a rectangle of it (`columns` for matrices only), on the CPU, maybe not contiguous.

        Copy it to its place and let go of it: a large one is a view of the file. Slices have no step. Raises
        CheckpointError when the file has become shorter since it was opened.
        """
        if not self.shape:
            return self._read_stored(0, 1).view(())
        first_row, n_rows = _span(rows, self.shape[0])
        if len(self.shape) != 2:
            if columns is not None:
                raise ValueError(f"{self.name} {self.shape} has no columns to slice")
            width = prod(self.shape[1:])
            return self._read_stored(first_row * width, n_rows * width).view(n_rows, *self.shape[1:])
        first_column, n_columns = _span(columns, self.shape[1])
        first_row += self._origin.first_row
        if self._origin.transposed:
            return self._read_rectangle(first_column, n_columns, first_row, n_rows).t()
        return self._read_rectangle(first_row, n_rows, first_column, n_columns)

    def as_fp8(self) -> "tuple[TensorSource, TensorSource] | None":
        """Codes [O, I] and scales [O / 128, I / 128] as they are stored; None where they are not, or end in a block."""
        origin = self._origin
        edges = (*self.shape, origin.first_row)
        if self._scales is None or self._block != DEFAULT_BLOCK or any(n % FP8_BLOCK for n in edges):
            return None
        n_out, n_in = self.shape
        shape = (n_out // FP8_BLOCK, n_in // FP8_BLOCK)
        of_scales = Origin(
            self._scales.stored_name, shape, first_row=origin.first_row // FP8_BLOCK, transposed=origin.transposed
        )
        return (
            replace(self, dtype=self._stored_dtype, _scales=None),
            replace(self._scales, shape=shape, _origin=of_scales),
        )

    def _read_rectangle(self, first_row: int, n_rows: int, first_column: int, n_columns: int) -> Tensor:
        """Counted as stored. Only whole rows are contiguous in the file, so all their columns are mapped."""
        width = self._stored.shape[-1]
        values_rc = self._read_stored(first_row * width, n_rows * width).view(n_rows, width)
        values_rc = values_rc[:, first_column : first_column + n_columns]
        if self._scales is None:
            return values_rc
        return dequantise_blocks(values_rc, self._scales.read(), first_row, first_column, self._block)

    def _read_stored(self, first: int, n_elements: int) -> Tensor:
        """Elements `first` to `first + n_elements` of the stored tensor, or of its `index`-th part, flat."""
        if self._origin.index is not None:
            first += self._origin.index * prod(self._stored.shape[1:])
        elif len(self.shape) == 1:
            first += self._origin.first_row
        return _read_elements(self._stored, self._stored_dtype, first, n_elements)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of one folder by canonical name.

    Multi-token prediction modules and the head of a tied model are left out.
    """

    folder: Path
    layout: Layout
    tensors: Mapping[str, TensorSource]

    @staticmethod
    def open(folder: Path) -> "Checkpoint":
        """Read config.json and the headers of all weight files.

        Raises CheckpointError when a file is missing, truncated or malformed, or a tensor cannot be used as it is
        stored; ConfigError for a bad config.json and for a quantisation that cannot be read.
        """
        config = read_config(folder)
        stored = read_headers(folder)
        if not stored:
            raise CheckpointError(
                f"{folder}: holds no weights: no model.safetensors and no model.safetensors.index.json"
            )
        layout = detect_layout({name: tensor.shape for name, tensor in stored.items()})
        block = read_block_size(config, layout, stored)
        origins = find_origins(stored, layout, has_tied_embeddings(config, layout))
        sources = {name: _make_source(name, origin, stored, layout, block) for name, origin in origins.items()}
        return Checkpoint(folder, layout, MappingProxyType(sources))

    def require(self, name: str, shape: tuple[int, ...]) -> TensorSource:
        """The tensor `name`, whose shape the model expects to be `shape`.

        Raises CheckpointError naming the tensor, the folder or file, and both shapes.
        """
        source = self.tensors.get(name)
        if source is None:
            raise CheckpointError(
                f"{self.folder}: the tensor {name} {list(shape)} is missing ({self.layout.value} layout, "
                f"{len(self.tensors)} tensors); config.json and the weights do not fit together"
            )
        if source.shape != tuple(shape):
            stored_as = "" if source.stored_name == name else f" (stored as {source.stored_name})"
            raise CheckpointError(
                f"{source.file}: {name}{stored_as} has shape {list(source.shape)}, expected {list(shape)}; "
                f"config.json and the weights do not fit together"
            )
        return source

    def unused(self, names_used: Iterable[str]) -> list[str]:
        """Canonical names of the tensors that are not among `names_used`, sorted."""
        return sorted(self.tensors.keys() - set(names_used))


def _make_source(
    name: str, origin: Origin, stored: Mapping[str, StoredTensor], layout: Layout, block: tuple[int, int]
) -> TensorSource:
    """Check that the stored tensor can be read as `origin` says."""
    tensor = stored[origin.stored]
    dtype = _torch_dtype(tensor, layout)
    if origin.scale is None:
        if not dtype.is_floating_point:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} has dtype {tensor.dtype}; weights are floating-point numbers"
            )
        return TensorSource(name, origin.shape, dtype, tensor, dtype, origin)
    table = stored[origin.scale]
    if tensor.dtype not in CODE_DTYPES or len(tensor.shape) != 2:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} {tensor.dtype} {list(tensor.shape)} has scales but is no FP8 matrix; "
            f"supported is block-wise FP8"
        )
    expected = tuple(-(-n // b) for n, b in zip(tensor.shape, block, strict=True))
    if table.shape != expected or not table.dtype.startswith(("F", "BF", "U16")):
        raise CheckpointError(
            f"{table.file}: {table.name} {table.dtype} {list(table.shape)} does not fit {tensor.name} "
            f"{list(tensor.shape)}: blocks of {list(block)} need floating-point numbers {list(expected)}"
        )
    scale_dtype = _torch_dtype(table, layout)
    scales = TensorSource(table.name, table.shape, scale_dtype, table, scale_dtype, Origin(table.name, table.shape))
    return TensorSource(name, origin.shape, torch.float32, tensor, torch.float8_e4m3fn, origin, scales, block)


def _torch_dtype(tensor: StoredTensor, layout: Layout) -> torch.dtype:
    dtypes = PADDLE_DTYPES if layout is Layout.PADDLE else DTYPES
    if tensor.dtype not in dtypes:
        raise CheckpointError(f"{tensor.file}: {tensor.name} has dtype {tensor.dtype}, which cannot be read")
    return dtypes[tensor.dtype]


def _span(part: slice | None, size: int) -> tuple[int, int]:
    """First index and length of `part` of an axis of `size`."""
    if part is None:
        return 0, size
    start, stop, step = part.indices(size)
    if step != 1:
        raise ValueError(f"{part}: only slices without a step can be read")
    return start, max(0, stop - start)


def _read_elements(stored: StoredTensor, dtype: torch.dtype, first: int, n_elements: int) -> Tensor:
    """Elements of `stored` counted in file order, flat; the bytes are taken as `dtype`."""
    begin, n_bytes = stored.offset + first * dtype.itemsize, n_elements * dtype.itemsize
    if n_bytes == 0:
        return torch.empty(0, dtype=dtype)
    try:
        with stored.file.open("rb") as f:
            if n_bytes >= MAP_FROM_BYTES and begin % dtype.itemsize == 0:
                skip = begin % mmap.ALLOCATIONGRANULARITY
                mapping = mmap.mmap(f.fileno(), skip + n_bytes, access=mmap.ACCESS_COPY, offset=begin - skip)
                return torch.frombuffer(mapping, dtype=dtype, count=n_elements, offset=skip)
            buffer = bytearray(n_bytes)
            f.seek(begin)
            n_read = f.readinto(buffer)
    except (OSError, ValueError) as exc:  # ValueError: the file is shorter than the mapping
        raise CheckpointError(f"{stored.file}: cannot read {stored.name}: {exc}") from exc
    if n_read != n_bytes:
        raise CheckpointError(f"{stored.file}: cannot read {stored.name}: it was truncated after it was opened")
    return torch.frombuffer(buffer, dtype=dtype)
