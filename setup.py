"""Packages fdistill_ops with its compiled modules; csrc/compile_kernels.py builds them, and lists what it reads from
the environment.

Without a C++ compiler the package installs all the same; fdistill_ops.build_info() then says what was missing.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

from compile_kernels import MODULES, build, remove_stale_emulator  # noqa: E402
from version import version  # noqa: E402


class BuildKernels(build_ext):
    def build_extensions(self) -> None:
        targets = [Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions]
        build(targets, Path(self.build_temp).resolve(), self.distribution.get_version())

    def get_outputs(self) -> list[str]:
        outputs = [Path(output) for output in super().get_outputs()]
        records = [output.with_name("_build.json") for output in outputs]
        return [str(path) for path in (*outputs, *records) if path.exists()]

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the module, if there is one, and the record of the build beside the sources."""
        package = ROOT / "fdistill_ops"
        remove_stale_emulator(package)
        for ext in self.extensions:
            built = Path(self.get_ext_fullpath(ext.name) if not self.inplace else self.build_lib_path(ext))
            for path in (built, built.with_name("_build.json")):
                if path.exists() and path.resolve() != (package / path.name).resolve():
                    shutil.copy2(path, package / path.name)
            if not built.exists():
                (package / built.name).unlink(missing_ok=True)

    def build_lib_path(self, ext: Extension) -> Path:
        return Path(self.build_lib) / self.get_ext_filename(ext.name)


def long_description() -> str:
    """The README for package indices, where relative links lead nowhere: pictures by their raw files, pages by the
    repository's."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Repository = "(.+)"$', project, re.MULTILINE)  # Python 3.10 has no tomllib
    assert found is not None, "pyproject.toml names no repository"
    repository = found[1]

    def absolute(link: re.Match[str]) -> str:
        picture, text, path = link.groups()
        if re.match(r"[a-z]+:|#", path):
            return link[0]
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/main/{path})"

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"(```.*?```)", text, flags=re.DOTALL)  # code stays as it is
    parts[::2] = [re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, part) for part in parts[::2]]
    return "".join(parts)


setup(
    version=version(),
    long_description=long_description(),
    long_description_content_type="text/markdown",
    ext_modules=[Extension(f"fdistill_ops.{name}", []) for name in MODULES],
    cmdclass={"build_ext": BuildKernels},
)
