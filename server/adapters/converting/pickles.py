"""Tensors out of pickles, read in a process of its own that can do no harm.

Owns that process, its limits, and the sentences for what goes wrong in it. Knows nothing about what the tensors are.
"""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from server.ground.errors import AdapterRejected

_PROGRAM = Path(__file__).with_name("pickle_process.py")
_MAX_SHOWN = 200  # characters of what the process says when it ends
_MAX_SHOWN_BYTES = 4096  # that are looked at for them


@dataclass(frozen=True, slots=True)
class PickleLimits:
    """What reading a folder's pickles may take."""

    max_file_bytes: int = 1 << 30
    spare_bytes: int = 256 << 20  # of memory, beside eight times the largest file
    cpu_s: int = 300
    wall_s: float = 600.0


def read_pickles(paths: Sequence[Path], limits: PickleLimits | None = None) -> tuple[Mapping[str, torch.Tensor], ...]:
    """The floating tensors of each file by name, float32 on the CPU, finite.

    No byte of a file is interpreted in this process. Raises AdapterRejected, naming the file, for whatever holds
    something else than tensors, breaks a limit or is not finite.
    """
    limits = limits or PickleLimits()
    largest = max(path.stat().st_size for path in paths)
    if largest > limits.max_file_bytes:
        too_large = next(path for path in paths if path.stat().st_size == largest)
        raise AdapterRejected(f"{too_large.name} has {largest} bytes; the limit is {limits.max_file_bytes}.")
    with tempfile.TemporaryDirectory(prefix="graft-pickles-") as folder:
        _run(paths, Path(folder), 8 * largest + limits.spare_bytes, limits)
        return tuple(_load(Path(folder) / f"{number}.safetensors", path) for number, path in enumerate(paths))


def _run(paths: Sequence[Path], folder: Path, max_bytes: int, limits: PickleLimits) -> None:
    """Isolated (-I) and with a bare environment: what a file could get out of torch's reader to see is little."""
    where, errors = paths[0].parent, folder / "stderr"
    try:
        with errors.open("wb") as stderr:
            done = subprocess.run(
                [sys.executable, "-I", str(_PROGRAM), str(folder), str(max_bytes), str(limits.cpu_s)],
                input=json.dumps([str(path.absolute()) for path in paths]).encode(),
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={"OMP_NUM_THREADS": "1"},
                start_new_session=True,
                timeout=limits.wall_s,
                check=False,
            )
    except subprocess.TimeoutExpired as error:
        raise AdapterRejected(f"Reading {where} took more than {limits.wall_s:g} s.") from error
    except OSError as error:
        raise AdapterRejected(f"The process that reads the .bin files of {where} did not start: {error}.") from error
    if done.returncode != 0:
        raise AdapterRejected(f"The process that reads the .bin files of {where} {_end(done.returncode, errors)}.")
    answer = json.loads(done.stdout)
    if answer:
        raise AdapterRejected(f"{paths[answer['file']].name}: {answer['words']}. Save the adapter again from pyreft.")


def _end(returncode: int, errors: Path) -> str:
    """How the process ended. What it last wrote is shown as data: a file may have had a say in it."""
    if returncode < 0:
        by = signal.strsignal(-returncode) or f"signal {-returncode}"
        return f"was killed ({by}): they take too much memory or time. Save the adapter again from pyreft"
    with errors.open("rb") as written:
        written.seek(max(0, errors.stat().st_size - _MAX_SHOWN_BYTES))
        lines = written.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
    return f"ended with the status {returncode}, and last wrote {last[-_MAX_SHOWN:]!r}"


def _load(written: Path, path: Path) -> Mapping[str, torch.Tensor]:
    try:
        tensors = load_file(str(written))
    except (OSError, SafetensorError) as error:
        raise AdapterRejected(f"{path.name} cannot be read ({error}). Save the adapter again from pyreft.") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterRejected(f"{path.name}: {name} contains NaN or infinity: the training run diverged.")
    return tensors
