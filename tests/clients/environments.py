"""The environments that foreign clients run in: one virtual environment each, because what they ask for clashes.

Owns how they are made and where they are kept: in `.clients/` at the root of the checkout, which git ignores. A list in
`requirements/` fixes every version; an environment is made when a test first asks for it, and anew when its list
changes. Making one needs the package registries; using it does not. Knows nothing about what is tested.
"""

import fcntl
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KEPT = ROOT / ".clients"
NPM_PACKAGES: Mapping[str, str] = {"openai-npm": "openai@7.57.0"}
_INSTALL_TIMEOUT_S = 1800.0
_RUN_TIMEOUT_S = 1800.0


class NotMade(Exception):
    """An environment could not be made; the installer's own last words."""


@dataclass(frozen=True, slots=True)
class Environment:
    folder: Path

    @property
    def program_folder(self) -> Path:
        return self.folder / "bin"

    def run(self, *command: str, home: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Runs a program of the environment to its end, with nothing of this process's settings but the search path.

        `home` is what it takes for the user's folder. Both its outputs are in `stdout`.
        """
        path = f"{self.program_folder}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        return subprocess.run(
            [str(self.program_folder / command[0]), *command[1:]],
            env={**own, **variables},
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=_RUN_TIMEOUT_S,
        )


def environment(name: str) -> Environment:
    """The environment of `requirements/<name>.txt`, made if it is not there. Raises NotMade."""
    recipe = _recipe(name)
    folder = KEPT / name
    made_from = folder / "made-from.txt"
    with _alone():
        if not made_from.is_file() or made_from.read_text(encoding="utf-8") != recipe:
            shutil.rmtree(folder, ignore_errors=True)
            _make(name, folder)
            made_from.write_text(recipe, encoding="utf-8")
    return Environment(folder)


def version_of(name: str, package: str) -> str:
    """The version of a package in `requirements/<name>.txt`, or of the one from npm."""
    if NPM_PACKAGES.get(name, "").startswith(f"{package}@"):
        return NPM_PACKAGES[name].partition("@")[2]
    lines = (HERE / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.partition("==")[0].replace("_", "-") == package)


def _recipe(name: str) -> str:
    """All that an environment is made from: another recipe, another environment."""
    listed = (HERE / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    return f"{platform.python_version()} {sys.prefix}\n{NPM_PACKAGES.get(name, '')}\n{listed}"


@contextmanager
def _alone() -> Iterator[None]:
    """Two test runs in one checkout must not make the same environment at once."""
    KEPT.mkdir(exist_ok=True)
    (KEPT / ".gitignore").write_text("*\n", encoding="utf-8")
    with (KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(name: str, folder: Path) -> None:
    python = folder / "bin" / "python"
    requirements = HERE / "requirements" / f"{name}.txt"
    _install(sys.executable, "-m", "venv", str(folder))
    _install(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements))
    if name in NPM_PACKAGES:
        npm = str(folder / "bin" / "npm")
        _install(npm, "install", "--prefix", str(folder), "--no-save", "--no-audit", "--no-fund", NPM_PACKAGES[name])


def _install(*command: str) -> None:
    """As the user would: with their indexes and proxies, but none of this process's Python."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    folder = f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        env=inherited | {"PATH": folder},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=_INSTALL_TIMEOUT_S,
    )
    if done.returncode:
        raise NotMade(f"{' '.join(command)} failed; it needs the package registries:\n{done.stdout[-3000:]}")
