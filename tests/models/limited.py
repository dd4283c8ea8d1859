"""Reads files in a process with little memory and time; started by the fixtures of this folder.

python limited.py paths             reads a path from each line, and prints what reading the file led to
python limited.py fuzz FILE N SEED  reads N damaged forms of a file, and prints how many could be read
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from yolov12.errors import UnreadableWeightsError
from yolov12.models import limits, weights

MEMORY = 512 << 20  # more than this process has
SECONDS = 20  # of a processor: on a busy machine it takes longer
limits.MAX_STEPS //= 10  # a tenth of the time


def limit() -> None:
    used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)


def tensors(found: Any) -> Iterator[torch.Tensor]:
    seen, stack = set(), [found]
    while stack:
        thing = stack.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            yield thing
        elif isinstance(thing, dict):
            stack += [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set, frozenset)):
            stack += list(thing)
        elif not callable(thing) or isinstance(thing, torch.nn.Module):
            stack += getattr(thing, "__dict__", {}).values()


def check(found: Any, content: bytes) -> None:
    """Every tensor lies in its storage, and the file has the bytes of this storage. A copy of the object is made."""
    for tensor in tensors(found):
        storage = tensor.untyped_storage()
        held = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()
        assert held in content, "memory that is not in the file"
        if tensor.numel():
            last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            assert (tensor.storage_offset() + last + 1) * tensor.element_size() <= storage.nbytes()
        tensor.clone()


def outcome(path: str) -> str:
    try:
        found = weights.read(path)
    except UnreadableWeightsError as error:
        return str(error)
    content = Path(path).read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content += b"".join(archive.read(entry) for entry in archive.infolist() if entry.compress_type)
    check(found, content)
    return f"{type(found).__name__}, {len(repr(found)) if not isinstance(found, torch.nn.Module) else 'layer'}"


def answer(path: str) -> str:
    """Read a file in a process of its own."""
    end, start = os.pipe()
    if not (process := os.fork()):
        limit()
        try:
            text = outcome(path)
        except BaseException as error:
            text = f"WRONG {type(error).__name__}: {error}"
        os.write(start, text.encode())
        os._exit(0)
    os.close(start)
    with os.fdopen(end, "rb") as pipe:
        text = pipe.read().decode()
    status = os.waitpid(process, 0)[1]
    return text or f"WRONG it died with status {status}"


INTERESTING = (0, 1, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
OPCODES = (
    b"(.012BCGIJKLMNPQRSTUVXabcdeghijloprstqu}]\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8f\x90\x91\x92\x93\x94"
)


def damaged(content: bytes, places: range, chance: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.choice(places) % (len(data) or 1)
        kind = chance.randrange(7)
        end = at + chance.randrange(1, 64)
        if kind == 0:
            data[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            number = chance.choice(INTERESTING) % 2**64
            size = chance.choice((2, 4, 8))
            data[at : at + size] = struct.pack("<Q", number)[:size]
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end] * chance.choice((1, 1, 100))
        elif kind == 4:
            other = chance.randrange(len(data) or 1)
            data[at:end] = data[other : other + end - at]
        elif kind == 5:
            data[at:at] = bytes(chance.choices(OPCODES, k=chance.randrange(1, 9)))
        elif len(data) > 4:
            data[at : at + 1] = bytes([data[at] ^ 1 << chance.randrange(8)]) if at < len(data) else b""
    return bytes(data)


def variants(file: Path, count: int, seed: int) -> Iterator[bytes]:
    """Yield damaged forms of a file, and, if it is an archive, whole archives with its damaged pickle."""
    content, chance = file.read_bytes(), random.Random(seed)
    records = {}
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next((body for name, body in records.items() if name.endswith("data.pkl")), b"")
    for _ in range(count):
        if not records or chance.random() < 0.5:
            yield damaged(content, range(len(content)), chance)
            continue
        changed = damaged(pickled, range(len(pickled)), chance)
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w", chance.choice((0, 0, 0, zipfile.ZIP_DEFLATED))) as archive:
            for name, body in records.items():
                archive.writestr(name, changed if name.endswith("data.pkl") else body)
        yield whole.getvalue()


def fuzz(file: Path, count: int, seed: int) -> dict[str, int]:
    limit()
    known = file.read_bytes()  # of a compressed record, the bytes are here
    results: Counter[str] = Counter()
    memory = os.memfd_create("variant")  # a file on a disk takes longer than reading it
    for variant in variants(file, count, seed):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        os.ftruncate(memory, 0)
        os.pwrite(memory, variant, 0)
        try:
            found = weights.read(f"/proc/self/fd/{memory}")
            check(found, variant + known)
        except UnreadableWeightsError as error:
            results[type(error).__name__ if len(str(error).splitlines()) == 1 else "several lines"] += 1
        except BaseException:
            Path("wrong.pt").write_bytes(variant)
            raise
        else:
            results["read"] += 1
    return results


if __name__ == "__main__":
    if sys.argv[1] == "fuzz":
        print(json.dumps(fuzz(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
    else:
        for line in sys.stdin:
            print(json.dumps(answer(line.strip())), flush=True)
