"""What is refused: by name, before any kernel runs and before any state changes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import Backend
from torch import Tensor

import fdistill_ops as fd

META = torch.device("meta")


def good(backend: Backend) -> dict[str, Any]:
    return {
        "x": backend.leaf(3, 4, 5),
        "teacher": backend.randn(3, 4, 5, seed=1),
        "fake": backend.randn(3, 4, 5, seed=2),
    }


class Anything:
    """Neither a number nor a tensor."""


def bad_losses(backend: Backend) -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    """Changes to good arguments, the error and what its message must contain."""
    randn = backend.randn
    x_like = randn(3, 4, 5)
    dense = torch.zeros(3, 4, 5)
    noisy = {"prediction": "eps", "x_t": x_like, "alpha": 0.8, "sigma": 0.6}
    cases: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
        "x scalar": ({"x": randn()}, ValueError, "x "),
        "weight shape": ({"weight": randn(4)}, ValueError, "weight"),
        "weight trailing shape": ({"weight": randn(3, 5)}, ValueError, "weight"),
        "weight too many dims": ({"weight": randn(1, 3, 1, 1)}, ValueError, "weight"),
        "weight does not broadcast": ({"weight": randn(3, 2, 1)}, ValueError, "weight"),
        "weight dtype": ({"weight": torch.ones(3, dtype=torch.int64)}, TypeError, "weight"),
        "weight string": ({"weight": "1"}, TypeError, "weight"),
        "weight meta": ({"weight": torch.empty(3, device=META)}, ValueError, "weight"),
        "guidance without uncond": ({"guidance_scale": 3.0}, ValueError, "teacher_uncond"),
        "uncond without guidance": ({"teacher_uncond": x_like}, ValueError, "guidance_scale"),
        "guidance shape": ({"teacher_uncond": x_like, "guidance_scale": randn(4)}, ValueError, "guidance_scale"),
        "guidance rows": ({"teacher_uncond": x_like, "guidance_scale": randn(3, 4)}, ValueError, "guidance_scale"),
        "guidance nan": ({"teacher_uncond": x_like, "guidance_scale": math.nan}, ValueError, "guidance_scale"),
        "guidance string": ({"teacher_uncond": x_like, "guidance_scale": "big"}, TypeError, "guidance_scale"),
        "mask shape": ({"mask": torch.ones(4, 3, dtype=torch.bool)}, ValueError, "mask"),
        "mask too many dims": ({"mask": torch.ones(1, 3, 4, 5, dtype=torch.bool)}, ValueError, "mask"),
        "mask float": ({"mask": torch.ones(3, 4, 5)}, TypeError, "mask"),
        "mask uint8": ({"mask": torch.ones(3, 4, 5, dtype=torch.uint8)}, TypeError, "mask"),
        "mask meta": ({"mask": torch.ones(3, 4, 5, dtype=torch.bool, device=META)}, ValueError, "mask"),
        "mask list": ({"mask": [True]}, TypeError, "mask"),
        "prediction unknown": ({"prediction": "noise"}, ValueError, "prediction"),
        "prediction None": ({"prediction": None}, ValueError, "prediction"),
        "x_t missing": ({"prediction": "eps", "alpha": 0.8, "sigma": 0.6}, ValueError, "x_t"),
        "alpha missing": ({"prediction": "v", "x_t": x_like, "sigma": 0.6}, ValueError, "alpha"),
        "sigma missing": ({"prediction": "flow", "x_t": x_like, "alpha": 0.6}, ValueError, "sigma"),
        "x_t unused": ({"x_t": x_like}, ValueError, "x_t"),
        "alpha unused": ({"alpha": 0.8}, ValueError, "alpha"),
        "sigma unused": ({"sigma": 0.8}, ValueError, "sigma"),
        "x_t shape": (noisy | {"x_t": randn(3, 4, 1)}, ValueError, "x_t"),
        "alpha shape": (noisy | {"alpha": randn(5)}, ValueError, "alpha"),
        "sigma dtype": (noisy | {"sigma": torch.ones(3, dtype=torch.int32)}, TypeError, "sigma"),
        "sigma string": (noisy | {"sigma": "small"}, TypeError, "sigma"),
        "normalizer unknown": ({"normalizer": "rms"}, ValueError, "normalizer"),
        "normalizer number": ({"normalizer": 2.0}, ValueError, "normalizer"),
        "normalizer shape": ({"normalizer": randn(3, 1)}, ValueError, "normalizer"),
        "normalizer dtype": ({"normalizer": torch.ones(3, dtype=torch.int64)}, TypeError, "normalizer"),
        "normalizer meta": ({"normalizer": torch.empty(3, device=META)}, ValueError, "normalizer"),
        "eps negative": ({"eps": -1e-6}, ValueError, "eps"),
        "eps nan": ({"eps": math.nan}, ValueError, "eps"),
        "eps infinite": ({"eps": math.inf}, ValueError, "eps"),
        "eps string": ({"eps": "tiny"}, TypeError, "eps"),
        "nonfinite unknown": ({"nonfinite": "ignore"}, ValueError, "nonfinite"),
        "nonfinite bool": ({"nonfinite": True}, ValueError, "nonfinite"),
        "reduction unknown": ({"reduction": "max"}, ValueError, "reduction"),
        "reduction None": ({"reduction": None}, ValueError, "reduction"),
    }
    for name in ("x", "teacher", "fake"):
        cases |= {
            f"{name} None": ({name: None}, TypeError, name),
            f"{name} list": ({name: [1.0]}, TypeError, name),
            f"{name} int": ({name: torch.ones(3, 4, 5, dtype=torch.int64)}, TypeError, name),
            f"{name} bool": ({name: torch.ones(3, 4, 5, dtype=torch.bool)}, TypeError, name),
            f"{name} complex": ({name: torch.ones(3, 4, 5, dtype=torch.complex64)}, TypeError, name),
            f"{name} float8": ({name: dense.to(torch.float8_e4m3fn)}, TypeError, name),
            f"{name} sparse": ({name: dense.to_sparse()}, TypeError, name),
            f"{name} csr": ({name: torch.zeros(3, 4).to_sparse_csr()}, TypeError, name),
        }
    for name in ("teacher", "fake"):
        cases |= {
            f"{name} shape": ({name: randn(3, 4, 4)}, ValueError, name),
            f"{name} broadcastable": ({name: randn(1, 4, 5)}, ValueError, name),
            f"{name} flat": ({name: randn(60)}, ValueError, name),
            f"{name} meta": ({name: torch.empty(3, 4, 5, device=META)}, ValueError, name),
        }
    cases["uncond shape"] = ({"teacher_uncond": randn(3, 4), "guidance_scale": 2.0}, ValueError, "teacher_uncond")
    return cases


CASES = [
    *(f"{name} {what}" for name in ("x", "teacher", "fake") for what in ("None", "list", "int", "bool", "complex")),
    *(f"{name} {what}" for name in ("x", "teacher", "fake") for what in ("float8", "sparse", "csr")),
    *(f"{name} {what}" for name in ("teacher", "fake") for what in ("shape", "broadcastable", "flat", "meta")),
    *(
        "x scalar",
        "uncond shape",
        "weight shape",
        "weight trailing shape",
        "weight too many dims",
        "weight does not broadcast",
        "weight dtype",
    ),
    *("weight string", "weight meta", "guidance without uncond", "uncond without guidance", "guidance shape"),
    *("guidance rows", "guidance nan", "guidance string", "mask shape", "mask too many dims", "mask float"),
    *("mask uint8", "mask meta", "mask list", "prediction unknown", "prediction None", "x_t missing", "alpha missing"),
    *("sigma missing", "x_t unused", "alpha unused", "sigma unused", "x_t shape", "alpha shape", "sigma dtype"),
    *("sigma string", "normalizer unknown", "normalizer number", "normalizer shape", "normalizer dtype"),
    *("normalizer meta", "eps negative", "eps nan", "eps infinite", "eps string", "nonfinite unknown"),
    *("nonfinite bool", "reduction unknown", "reduction None"),
]
IDENTITY_ARGUMENTS = {"x", "teacher", "fake", "weight", "mask", "normalizer", "eps", "nonfinite", "reduction"}


def test_every_case_is_listed(backend: Backend) -> None:
    assert sorted(CASES) == sorted(bad_losses(backend))


@pytest.mark.parametrize("case", CASES)
def test_bad_loss_arguments(backend: Backend, case: str) -> None:
    """By every loss that takes the argument; the histogram does not change."""
    changes, error, says = bad_losses(backend)[case]
    arguments = good(backend) | changes
    with pytest.raises(error, match=says):
        fd.distribution_matching_loss(**arguments)
    with pytest.raises(error, match=says):
        fd.reference.distribution_matching_loss(**arguments)
    if set(changes) <= IDENTITY_ARGUMENTS:
        with pytest.raises(error, match=says):
            fd.score_identity_loss(**arguments)
    if "reduction" not in changes:
        out = torch.full((3, 4, 5), 7.0, device=backend.device)
        with pytest.raises(error, match=says):
            fd.score_difference(**arguments, out=out)
        assert bool((out == 7).all())
    if "weight" not in changes:
        histogram = fd.RatioHistogram(0.0, 1.0).to(backend.device)
        with pytest.raises(error, match=says):
            fd.f_distill_loss(**arguments, logits=backend.randn(3), t=backend.randn(3), histogram=histogram)
        assert histogram.bins.tolist() == [1.0] * 10


def bad_weights(backend: Backend) -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    randn = backend.randn
    histogram = fd.RatioHistogram(0.0, 1.0).to(backend.device)
    times = randn(3)
    return {
        "logits None": ({"logits": None}, TypeError, "logits"),
        "logits scalar": ({"logits": randn()}, ValueError, "logits"),
        "logits no places": ({"logits": randn(3, 1, 0, 4)}, ValueError, "logits"),
        "logits no heads": ({"logits": randn(3, 0)}, ValueError, "logits"),
        "logits int": ({"logits": torch.ones(3, dtype=torch.int64)}, TypeError, "logits"),
        "logits sparse": ({"logits": torch.ones(3).to_sparse()}, TypeError, "logits"),
        "divergence unknown": ({"divergence": "jensen_shanon"}, ValueError, "jensen_shannon"),
        "divergence number": ({"divergence": 3}, TypeError, "divergence"),
        "divergence None": ({"divergence": None}, TypeError, "divergence"),
        "divergence alpha": ({"divergence": "alpha:x"}, ValueError, "a"),
        "logit_clip negative": ({"logit_clip": -1.0}, ValueError, "logit_clip"),
        "logit_clip nan": ({"logit_clip": math.nan}, ValueError, "logit_clip"),
        "logit_clip string": ({"logit_clip": "ten"}, TypeError, "logit_clip"),
        "ratio_clip reversed": ({"ratio_clip": (20.0, 0.1)}, ValueError, "ratio_clip"),
        "ratio_clip negative": ({"ratio_clip": (-0.1, 2.0)}, ValueError, "ratio_clip"),
        "ratio_clip nan": ({"ratio_clip": (math.nan, 2.0)}, ValueError, "ratio_clip"),
        "ratio_clip number": ({"ratio_clip": 20.0}, TypeError, "ratio_clip"),
        "ratio_clip triple": ({"ratio_clip": (0.1, 1.0, 2.0)}, TypeError, "ratio_clip"),
        "ratio_clip zero": ({"ratio_clip": (0.0, 0.0)}, ValueError, "ratio_clip"),
        "normalize unknown": ({"normalize": "sum"}, ValueError, "normalize"),
        "normalize bool": ({"normalize": True}, ValueError, "normalize"),
        "nonfinite unknown": ({"nonfinite": "skip"}, ValueError, "nonfinite"),
        "eps negative": ({"eps": -1.0}, ValueError, "eps"),
        "t without a histogram": ({"histogram": None}, ValueError, "^t has no use"),
        "t missing": ({"t": None, "histogram": histogram}, ValueError, "t is missing"),
        "t shape": ({"t": randn(4), "histogram": histogram}, ValueError, "t "),
        "t pairs": ({"t": randn(3, 2), "histogram": histogram}, ValueError, "t "),
        "t scalar": ({"t": randn(), "histogram": histogram}, ValueError, "t "),
        "t number": ({"t": 0.5, "histogram": histogram}, TypeError, "t "),
        "t bool": ({"t": torch.ones(3, dtype=torch.bool), "histogram": histogram}, TypeError, "t "),
        "t complex": ({"t": torch.ones(3, dtype=torch.complex64), "histogram": histogram}, TypeError, "t "),
        "t meta": ({"t": torch.empty(3, device=META), "histogram": histogram}, ValueError, "t "),
        "histogram tensor": ({"t": times, "histogram": torch.ones(10)}, TypeError, "histogram"),
        "histogram meta": ({"t": times, "histogram": fd.RatioHistogram(0, 1).to(META)}, ValueError, "histogram"),
        "histogram object": ({"t": times, "histogram": Anything()}, TypeError, "histogram"),
    }


WEIGHT_CASES = [
    *("logits None", "logits scalar", "logits no places", "logits no heads", "logits int", "logits sparse"),
    *("divergence unknown", "divergence number", "divergence None", "divergence alpha", "logit_clip negative"),
    *("logit_clip nan", "logit_clip string", "ratio_clip reversed", "ratio_clip negative", "ratio_clip nan"),
    *("ratio_clip number", "ratio_clip triple", "ratio_clip zero", "normalize unknown", "normalize bool"),
    *(
        "nonfinite unknown",
        "eps negative",
        "t without a histogram",
        "t missing",
        "t shape",
        "t pairs",
        "t scalar",
        "t number",
        "t bool",
    ),
    *("t complex", "t meta", "histogram tensor", "histogram meta", "histogram object"),
]


def test_every_weight_case_is_listed(backend: Backend) -> None:
    assert sorted(WEIGHT_CASES) == sorted(bad_weights(backend))


@pytest.mark.parametrize("case", WEIGHT_CASES)
def test_bad_weight_arguments(backend: Backend, case: str) -> None:
    changes, error, says = bad_weights(backend)[case]
    histogram = fd.RatioHistogram(0.0, 1.0).to(backend.device)
    arguments = {"logits": backend.randn(3), "t": backend.randn(3), "histogram": histogram} | changes
    with pytest.raises(error, match=says):
        fd.f_weights(**arguments)
    with pytest.raises(error, match=says):
        fd.f_distill_loss(**good(backend), **arguments)
    kept = arguments["histogram"]
    for used in (histogram, kept):
        if isinstance(used, fd.RatioHistogram) and used.bins.device != META:
            assert used.bins.tolist() == [1.0] * 10


def test_batch_sizes_must_agree(backend: Backend) -> None:
    histogram = fd.RatioHistogram(0.0, 1.0).to(backend.device)
    for logits in (backend.randn(4), backend.randn(4, 2)):
        with pytest.raises(ValueError, match="logits"):
            fd.f_distill_loss(**good(backend), logits=logits, t=backend.randn(4), histogram=histogram)
    with pytest.raises(ValueError, match="logits"):
        fd.f_distill_loss(**good(backend), logits=torch.empty(3, device=META))
    assert histogram.bins.tolist() == [1.0] * 10


def test_unknown_divergence_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match="jensen_shannon") as caught:
        fd.get_divergence("jensen_shanon")
    message = str(caught.value)
    assert "divergence" in message
    assert "did you mean 'jensen_shannon'" in message
    for name in fd.DIVERGENCES:
        assert name in message
    for alias in ("rkl", "js", "neyman"):
        assert alias in message
    with pytest.raises(ValueError, match="no parameter"):
        fd.get_divergence("js", a=0.3)
    with pytest.raises(ValueError, match="finite"):
        fd.get_divergence("alpha", a=math.inf)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((1.0, 0.0), ValueError, "min_t"),
        ((1.0, 1.0), ValueError, "min_t"),
        ((math.nan, 1.0), ValueError, "min_t"),
        ((0.0, math.inf), ValueError, "max_t"),
        (("a", 1.0), TypeError, "min_t"),
        ((0.0, 1.0, 0), ValueError, "bins"),
        ((0.0, 1.0, 2.5), ValueError, "bins"),
        ((0.0, 1.0, True), ValueError, "bins"),
        ((0.0, 1.0, 10, -0.1), ValueError, "ema_rate"),
        ((0.0, 1.0, 10, 1.1), ValueError, "ema_rate"),
        ((0.0, 1.0, 10, math.nan), ValueError, "ema_rate"),
    ],
)
def test_histogram_arguments(arguments: tuple[Any, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        fd.RatioHistogram(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"divergence": "jss"}, ValueError, "divergence"),
        ({"histogram": torch.ones(10)}, TypeError, "histogram"),
        ({"logit_clip": -1.0}, ValueError, "logit_clip"),
        ({"ratio_clip": (2.0, 1.0)}, ValueError, "ratio_clip"),
        ({"normalize": "max"}, ValueError, "normalize"),
        ({"normalizer": "max"}, ValueError, "normalizer"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"nonfinite": "max"}, ValueError, "nonfinite"),
        ({"eps": -1.0}, ValueError, "eps"),
    ],
)
def test_module_settings_are_checked_when_it_is_made(
    arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        fd.FDistillLoss(**arguments)


def test_out(backend: Backend) -> None:
    arguments = {name: value.detach() for name, value in good(backend).items()}
    bad: list[tuple[Any, type[Exception]]] = [
        (torch.empty(3, 4), ValueError),
        (torch.empty(3, 4, 5, dtype=torch.float64), ValueError),
        (torch.empty(3, 4, 5, device=META), ValueError),
        (torch.empty(1, 4, 5).expand(3, 4, 5), ValueError),
        (torch.empty(3, 4, 5, requires_grad=True), ValueError),
        ([0.0], TypeError),
    ]
    for out, error in bad:
        with pytest.raises(error, match="out"):
            fd.score_difference(**arguments, out=out)
    storage = backend.randn(2 * 60 + 1)
    arguments["teacher"] = storage[:60].view(3, 4, 5)
    kept = storage.clone()
    for overlapping in (
        storage[1:61].view(3, 4, 5),
        storage[59:119].view(3, 4, 5),
        storage[:60].view(5, 4, 3).permute(2, 1, 0),
    ):
        with pytest.raises(ValueError, match="out"):
            fd.score_difference(**arguments, out=overlapping)
    assert torch.equal(storage, kept)
    fd.score_difference(**arguments, out=storage[60:120].view(3, 4, 5))
    assert torch.equal(storage[:60], kept[:60])
    assert torch.equal(storage[120:], kept[120:])


def test_out_that_aliases_itself(backend: Backend) -> None:
    """Not only stride 0: overlapping windows too."""
    arguments = {name: backend.randn(4, 6, seed=s) for s, name in enumerate(("x", "teacher", "fake"))}
    window = backend.randn(40).as_strided((4, 6), (2, 1))
    with pytest.raises((ValueError, RuntimeError), match=r"out|memory"):
        fd.score_difference(**arguments, out=window)


@pytest.mark.parametrize("name", ["real_logits", "fake_logits", "logits"])
def test_gan_losses(backend: Backend, name: str) -> None:
    for bad in ([1.0], torch.ones(3, dtype=torch.int64), torch.ones(3).to_sparse()):
        with pytest.raises(TypeError, match=name):
            if name == "logits":
                fd.gan_generator_loss(bad)  # type: ignore[arg-type]
            elif name == "real_logits":
                fd.gan_discriminator_loss(bad, backend.randn(3))  # type: ignore[arg-type]
            else:
                fd.gan_discriminator_loss(backend.randn(3), bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"prediction": "noise"}, ValueError, "prediction"),
        ({"pred": [1.0]}, TypeError, "pred"),
        ({"x_t": torch.ones(3, 4)}, ValueError, "x_t"),
        ({"x_t": torch.empty(3, 5, device=META)}, ValueError, "x_t"),
        ({"x_t": None}, TypeError, "x_t"),
        ({"alpha": torch.ones(5)}, ValueError, "alpha"),
        ({"sigma": torch.ones(3, 5, 1)}, ValueError, "sigma"),
        ({"sigma": None}, TypeError, "sigma"),
        ({"sigma": torch.ones(3, dtype=torch.int64)}, TypeError, "sigma"),
    ],
)
def test_to_x0(backend: Backend, changes: dict[str, Any], error: type[Exception], says: str) -> None:
    arguments = {"pred": backend.randn(3, 5), "x_t": backend.randn(3, 5), "prediction": "v", "alpha": 0.8, "sigma": 0.6}
    with pytest.raises(error, match=says):
        fd.to_x0(**(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [None, "one", math.nan, math.inf, torch.ones(1)])
def test_score_identity_alpha(backend: Backend, alpha: Any) -> None:
    if isinstance(alpha, Tensor):
        return
    with pytest.raises((TypeError, ValueError), match="alpha"):
        fd.score_identity_loss(**good(backend), alpha=alpha)


def test_an_inference_gradient_is_not_promised_to_integers(backend: Backend) -> None:
    """Everything positional beyond the tensors is keyword-only."""
    arguments = good(backend)
    with pytest.raises(TypeError, match="positional"):
        fd.distribution_matching_loss(*arguments.values(), backend.randn(3))
    with pytest.raises(TypeError, match="positional"):
        fd.f_weights(backend.randn(3), backend.randn(3), "js")


def test_dtensor_is_refused(backend: Backend) -> None:
    """By name, with what to pass instead."""
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.tensor import distribute_tensor
    except ImportError:  # before 2.5
        from torch.distributed._tensor import distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        pytest.skip("a process group exists already")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh(backend.device, (2,))
        arguments = good(backend)
        for name in ("x", "teacher", "fake"):
            spread = distribute_tensor(arguments[name].detach(), mesh)
            for function in (fd.distribution_matching_loss, fd.score_identity_loss, fd.score_difference):
                with pytest.raises(TypeError, match=rf"{name} is a DTensor.*to_local"):
                    function(**(arguments | {name: spread}))
        with pytest.raises(TypeError, match="logits is a DTensor"):
            fd.f_weights(distribute_tensor(backend.randn(4), mesh))
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------- back ends


def test_unknown_back_end() -> None:
    with pytest.raises(ValueError, match=r"reference.*cpu"):
        fd.set_backend("gpu")
    with pytest.raises(ValueError, match="cuda12"), fd.use_backend("cuda12"):
        pass


def test_use_backend_restores_even_after_an_error(backend: Backend) -> None:
    try:
        with fd.use_backend("reference"):
            raise KeyError
    except KeyError:
        pass
    from fdistill_ops import backends

    assert backends.choose(torch.device(backend.device)) == backend.name


def test_an_override_that_cannot_serve_raises() -> None:
    if "cpu" not in fd.available_backends():
        pytest.skip("not compiled")
    x = torch.empty(2, 3, device=META)
    with fd.use_backend("cpu"), pytest.raises(RuntimeError, match=r"cpu.*meta"):
        fd.distribution_matching_loss(x, x, x)
    with fd.use_backend(None), pytest.raises(RuntimeError, match="meta"):
        fd.distribution_matching_loss(x, x, x)


@pytest.mark.slow
def test_environment_variable() -> None:
    script = (
        "import fdistill_ops as fd, torch; x = torch.ones(2, 3); print(fd.distribution_matching_loss(x, x, x).item())"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(fd.__file__)))
    paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    for name, good_name in (("reference", True), ("nonsense", False)):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"FDISTILL_BACKEND": name, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) == good_name, done.stderr
        if not good_name:
            assert "FDISTILL_BACKEND" in done.stderr
            assert "nonsense" in done.stderr


def test_import_is_light() -> None:
    """No hypothesis, no triton, no compilation and no device probing at import."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(fd.__file__)))
    script = (
        "import sys, torch\nbefore = set(sys.modules)\nimport fdistill_ops\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'hypothesis', 'triton', 'sympy', 'scipy', 'pytest'}, new\n"
        "assert not torch.cuda.is_initialized()\n"
        "import fdistill_ops.testing\nassert 'hypothesis' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
