"""The shared library of the C files here: compiled for this processor when it is first wanted, and kept on disk.

Owns the compiler's command, where its result lies, and how its functions are called, which the sources say. Knows
nothing about tensors.
"""

import ctypes
import hashlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = sorted(_FOLDER.glob("*.c"))
_HEADERS = sorted(_FOLDER.glob("*.h"))
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_COMPILERS = (
    "gcc",
    "cc",
    "clang",
)  # GCC first: PyTorch's wheels bring its OpenMP, and two pools of threads would fight
_MAX_COMPILE_S = 120

_FUNCTION = re.compile(r"^(void|int64_t) (graft_\w+)\(([^)]*)\) \{", re.MULTILINE)


class CannotCompile(Exception):
    """There is no library for this machine; the message says why and what would help."""


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises CannotCompile."""
    loaded = ctypes.CDLL(str(_built()))
    for result, name, parameters in _FUNCTION.findall(_text(_SOURCES)):
        function = getattr(loaded, name)
        function.argtypes = [_type_of(parameter) for parameter in parameters.split(",") if parameter != "void"]
        function.restype = None if result == "void" else ctypes.c_int64
    return loaded


def _text(files: Sequence[Path]) -> str:
    return "\n".join(file.read_text() for file in files)


def _type_of(parameter: str) -> type[ctypes.c_void_p | ctypes.c_double | ctypes.c_int64]:
    """Of a parameter as the source declares it; its functions have no others."""
    if "*" in parameter:
        return ctypes.c_void_p
    return ctypes.c_double if parameter.split()[0] == "double" else ctypes.c_int64


def _built() -> Path:
    command = _compiler()
    macros = _run([*command, *_FLAGS, "-dM", "-E", "-x", "c", os.devnull])
    # Two compilers, or two processors, differ in what they define; so a home on several machines holds one for each.
    flags = (*_FLAGS, "-shared", "-fPIC", *(() if "__clang__" in macros else ("-fopenmp",)))
    hashed = (_text([*_HEADERS, *_SOURCES]), macros, *flags)
    digest = hashlib.sha256("\0".join(hashed).encode()).hexdigest()[:24]
    folder = _own_folder()
    library = folder / f"kernels-{digest}.so"
    if not library.exists():
        log.info("compiling the kernels for this processor: %s", library)
        handle, scratch = tempfile.mkstemp(dir=folder, suffix=".so")
        os.close(handle)
        try:
            _run([*command, *flags, "-o", scratch, *map(str, _SOURCES), "-lm"])
            Path(scratch).replace(library)
        finally:
            Path(scratch).unlink(missing_ok=True)
    return library


def _compiler() -> list[str]:
    found = [[name] for name in _COMPILERS if shutil.which(name)]
    if "CC" in os.environ:
        found = [shlex.split(os.environ["CC"])]
    if not found or not found[0]:
        raise CannotCompile(
            "there is no C compiler (gcc, cc, clang, or what CC names); Debian: apt install gcc libc6-dev"
        )
    return found[0]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_MAX_COMPILE_S)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        raise CannotCompile(f"{command[0]}: {lines[0]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompile(f"{command[0]}: {error}") from error
    return done.stdout


def _own_folder() -> Path:
    """A folder that nobody else can write to: what lies there is run. Of this process alone where there is no other."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "graftserve" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.geteuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
        log.warning("%s can be written by others, or not by this user: the kernels are compiled anew", folder)
    except (OSError, RuntimeError) as error:  # a read-only home, or none
        log.warning("the compiled kernels cannot be kept: %s", error)
    return Path(tempfile.mkdtemp(prefix="graftserve-kernels-"))
