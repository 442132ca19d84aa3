"""The suite under other versions than the ones that ``make test`` uses: ``make pins``, or ``nox``.

Each session makes an environment of its own and installs the package into it from a wheel, which is built once for an
interpreter and a compiler. What a machine does not have is skipped, with the reason: an interpreter, a compiler, a
version of PyTorch or NumPy that cannot be installed.

    nox --list
    nox -s "tests(torch-2.11)"
    nox -- tests/test_losses.py -k "cpu or reference"      # these tests, in every session
    nox -- --quick                                         # the same tests, a few of each one's parameters
    FDISTILL_FULL=1 nox                                    # with builds of PyTorch of several gigabytes

"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
OURS = re.search(r"^TORCH = torch==(\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
assert OURS is not None

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
FULL = os.environ.get("FDISTILL_FULL", "") not in ("", "0")
# The numeric tests, and those of what PyTorch does with the operators.
TESTS = (
    "losses",
    "weights",
    "properties",
    "layouts",
    "cpu_backend",
    "autograd",
    "compile",
    "integrations",
    "errors",
    "versions",
)
VERSIONS = """
import platform, numpy, torch
print("Python", platform.python_version(), "torch", torch.__version__, "numpy", numpy.__version__)
"""


@dataclass(frozen=True)
class Pin:
    """What a session has that others have not. An empty string: what pip takes."""

    name: str
    python: str = "3.11"
    torch: str = f"=={OURS[1]}"
    triton: str = ""
    numpy: str = ""
    compiler: str = ""


# NumPy below 2.4: Triton 3.6 interprets under no later one.
PINS = [
    Pin("torch-2.4", python="3.10", torch="==2.4.1", triton="==3.0.*", numpy="<2"),
    Pin("torch-2.6", python="3.12", torch="==2.6.0", triton="==3.2.*", numpy="<2.4"),
    Pin("torch-2.8", torch="==2.8.0", triton="==3.4.*", numpy="<2.4"),
    Pin("torch-2.11", torch="==2.11.*", triton="==3.6.*", numpy="<2.4"),
    Pin("torch-newest", torch=""),
    *(Pin(f"python-{version}", python=version) for version in ("3.10", "3.11", "3.12", "3.13", "3.14")),
    Pin("numpy-1", numpy="<2"),
    Pin("numpy-2", numpy=">=2"),
    Pin("clang", compiler="clang++"),
]


def interpreter(version: str) -> str | None:
    """A Python of that version that runs: what stands on the PATH may be a shim with nothing behind it."""
    found = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for path in filter(None, found):
        done = subprocess.run([str(path), "--version"], capture_output=True, check=False)
        if done.returncode == 0:
            return str(path)
    return None


def on_disk(python: Path, requirement: str) -> bool:
    """Whether it is installed, or pip finds a file of it without asking an index."""
    options = ["--quiet", "--no-index", "--no-deps", "--dry-run"]
    done = subprocess.run(
        [str(python), "-m", "pip", "install", *options, requirement], capture_output=True, check=False
    )
    return done.returncode == 0


_wheels: dict[tuple[str, str], Path] = {}


def wheel(session: nox.Session, python: Path, pin: Pin, environment: dict[str, str]) -> Path:
    """The package as a wheel for this interpreter, by this compiler."""
    key = (pin.python, pin.compiler)
    if key not in _wheels:
        folder = ROOT / ".nox" / "wheels" / "-".join(filter(None, key))
        shutil.rmtree(folder, ignore_errors=True)
        options = ["-q", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
        session.run(str(python), "-m", "pip", "wheel", *options, env=environment, external=True)
        (_wheels[key],) = folder.glob("*.whl")
    return _wheels[key]


@nox.session(python=False)
@nox.parametrize("pin", [nox.param(pin, id=pin.name) for pin in PINS])
def tests(session: nox.Session, pin: Pin) -> None:
    """TESTS, or the tests behind ``--``."""
    python = interpreter(pin.python)
    if python is None:
        session.skip(f"no Python {pin.python} here")
    if pin.compiler and shutil.which(pin.compiler) is None:
        session.skip(f"no {pin.compiler} here")
    folder = ROOT / ".nox" / pin.name
    own = folder / "bin" / "python"
    if not own.exists():
        session.run(python, "-m", "venv", str(folder), external=True)
    emulator = {"FDISTILL_EMULATOR": os.environ.get("FDISTILL_EMULATOR", "1")}
    built = {"FDISTILL_CUDA": "0"} | emulator | ({"CXX": pin.compiler} if pin.compiler else {})

    if not (FULL or (pin.torch and on_disk(own, f"torch{pin.torch}"))):
        session.skip(
            f"torch{pin.torch} for Python {pin.python} would be downloaded, with CUDA several gigabytes "
            "(make pins FULL=1, or FDISTILL_FULL=1, does so)"
        )

    def pip(what: str, *requirements: str) -> None:
        try:
            session.run(str(own), "-m", "pip", "install", "-q", *requirements, env=built, external=True)
        except nox.command.CommandFailed:
            session.skip(f"{what} cannot be installed here")

    pip(f"torch{pin.torch}", f"torch{pin.torch}", f"numpy{pin.numpy}")
    built_wheel = str(wheel(session, own, pin, built))
    pip("the package", "--no-deps", "--force-reinstall", built_wheel)
    pip("what the tests need", f"{built_wheel}[test]", f"torch{pin.torch}", f"numpy{pin.numpy}", f"triton{pin.triton}")
    if not pin.torch:  # the tests' requirements name a Triton, for which pip takes an older PyTorch
        pip("the newest torch and triton", "--upgrade", "torch", "triton", f"numpy{pin.numpy}")
    session.run(str(own), "-c", VERSIONS, external=True)
    # From a folder without the sources, so that the installed package is the one that is tested.
    arguments = [*session.posargs]
    if not any("tests/" in word for word in arguments):
        arguments += [f"tests/test_{name}.py" for name in TESTS]
    arguments = [str(ROOT / word) if (ROOT / word.split("::")[0]).exists() else word for word in arguments]
    with session.chdir(folder):
        options = ["-q", "-n", "auto", "--maxprocesses", "8", "-p", "no:cacheprovider"]
        options += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
        # Without CXX, which PyTorch's inductor would take as well.
        session.run(str(own), "-m", "pytest", *options, *arguments, external=True, env=emulator)
