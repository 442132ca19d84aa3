"""SECURITY.md: what it says is so."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_cases import environment, need_extra

import fdistill_ops as fd
from fdistill_ops.trainer.__main__ import parse
from fdistill_ops.trainer.checkpoints import FORMAT, Checkpoints
from fdistill_ops.trainer.config import Config
from fdistill_ops.trainer.limits import LARGEST, DataError, Limits
from fdistill_ops.trainer.own_data import read
from fdistill_ops.trainer.pictures import FORMATS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
TEXT = " ".join(PAGE.split())


def test_formats() -> None:
    listed = re.search(r"decoded by Pillow, and only as ([A-Z, ]+) or ([A-Z]+),", TEXT)
    assert listed and (*listed[1].split(", "), listed[2]) == FORMATS


def test_limits(tmp_path: Path) -> None:
    rows = dict(re.findall(r"^\| `--([a-z-]+)` \| ([\d,]+) \|", PAGE, re.MULTILINE))
    need_extra()
    config = parse(["--out", str(tmp_path)])
    assert isinstance(config, Config)
    assert {name: int(value.replace(",", "")) for name, value in rows.items()} == {
        "max-pixels": config.max_pixels,
        "max-mib": config.max_mib,
    }
    assert Limits() == Limits(config.max_pixels, config.max_mib)
    assert f"at most {LARGEST:,} numbers" in TEXT
    pages = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
    assert f"`--max-pixels` ({config.max_pixels:,})" in pages and f"`--max-mib` ({config.max_mib:,})" in pages


def test_names_that_the_page_mentions() -> None:
    assert "expression" in (fd.register_divergence.__doc__ or "") and "strangers" in fd.register_divergence.__doc__
    for module in (fd.RatioHistogram(0, 1), fd.FDistillLoss(histogram=fd.RatioHistogram(0, 1))):
        assert {name.rpartition(".")[2] for name in module.state_dict()} == {"bins"}
    assert "@" not in PAGE and "://" not in PAGE  # no address


# ------------------------------------------------------------------------------------------------- nothing is executed


def trees() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(Path(fd.__file__).parent.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_nothing_in_the_package_executes_what_it_reads() -> None:
    """No module for it is imported, and what could is called with what prevents it."""
    forbidden = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "urllib", "http"}
    forbidden |= {"requests", "ftplib", "huggingface_hub"}
    found = []
    for path, tree in trees():
        for node in ast.walk(tree):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            found += [f"{path.name} imports {module}" for module in modules if module.split(".")[0] in forbidden]
            if isinstance(node, ast.Call):
                called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
                name = called.rpartition(".")[2]
                safe = {"load": "weights_only", "read_array": "allow_pickle"}
                if called in ("torch.load", "np.load", "np.lib.format.read_array"):
                    wanted = "True" if safe[name] == "weights_only" else "False"
                    if given.get(safe[name]) != wanted:
                        found.append(f"{path.name}: {called} without {safe[name]}={wanted}")
                if path.name == "_fingerprint.py" and called == "compile":
                    continue  # to compare it with the code that runs: without exec and eval nothing runs it
                if called in ("eval", "exec", "compile", "os.system", "os.popen") or name.startswith("fetch_"):
                    found.append(f"{path.name} calls {called}")
                if name == "sympify" and path.name != "divergences.py":
                    found.append(f"{path.name} calls {called}")
    assert not found


class Payload:
    """What its pickle does when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickles_are_not_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reached = tmp_path / "reached"
    objects = np.array([Payload(reached)] * 8, dtype=object)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "images.npz", images=objects)
    np.savez(tmp_path / "labels.npz", images=np.zeros((8, 4, 4), dtype=np.uint8), labels=objects)
    (tmp_path / "pickle.npy").write_bytes(objects.dumps())
    for name in ("a.npy", "images.npz", "labels.npz", "pickle.npy"):
        with pytest.raises(DataError, match="cannot be read"):
            read(tmp_path / name)
    checkpoints = Checkpoints(tmp_path / "cache", "js", "key")
    checkpoints.save(1, {"step": 1})
    content = {"format": FORMAT, "key": "key", "step": 2, "state": Payload(reached)}
    torch.save(content, checkpoints.path(2))
    torch.save(content | {"step": 3}, checkpoints.path(3), _use_new_zipfile_serialization=False)
    assert list(checkpoints.newest_first()) == [(1, {"step": 1})]
    assert capsys.readouterr().err.count(" is not used: ") == 2 and not reached.exists()
    torch.load(checkpoints.path(2), weights_only=False)
    assert reached.exists(), "the payload would have done it"


# Python tells of what it starts, connects to and unpickles.
WATCHED = """
import json, sys
from pathlib import Path
from PIL import Image
from fdistill_ops.trainer.checkpoints import Checkpoints
from fdistill_ops.trainer.own_data import read

folder = Path(sys.argv[1])
Image.init()
events = []
started = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn")
started += ("socket.", "urllib.", "pickle.")
sys.addaudithook(lambda name, arguments: events.append(name) if name.startswith(started) else None)
for path in sorted(folder.iterdir()):
    if path.name == "cache":
        assert list(Checkpoints(path, "js", "key").newest_first())
    else:
        assert len(read(path, 8).images) == 8
found = list(events)
import pickle, subprocess
pickle.loads(pickle.dumps(Path()))
subprocess.run(["true"])
print(json.dumps([found, sorted(set(events))]))
"""


@pytest.mark.slow
def test_reading_starts_nothing(tmp_path: Path) -> None:
    need_extra()
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 10, 3), dtype=np.uint8)
    for kind in FORMATS:
        (tmp_path / kind).mkdir()
        suffix = next(suffix for suffix, found in Image.registered_extensions().items() if found == kind)
        for index, picture in enumerate(pixels):
            Image.fromarray(picture).save(tmp_path / kind / f"{index}{suffix}", format=kind)
    np.save(tmp_path / "a.npy", pixels)
    np.savez_compressed(tmp_path / "a.npz", images=pixels, labels=np.array(["one class"] * 8))
    Checkpoints(tmp_path / "cache", "js", "key").save(1, {"tensor": torch.ones(3), "more": [1, 2.0, "three", None]})
    command = [sys.executable, "-c", WATCHED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    found, told = json.loads(done.stdout)
    assert found == [] and {"pickle.find_class", "subprocess.Popen"} <= set(told)
