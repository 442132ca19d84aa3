"""Back ends under test, poisoned allocations, and the comparison of a call with the oracle."""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def since(version: tuple[int, int], reason: str) -> pytest.MarkDecorator:
    """Skips a test under an older PyTorch, for a reason that docs/versions.md has too."""
    return pytest.mark.skipif(version > TORCH, reason=f"PyTorch before {version[0]}.{version[1]}: {reason}")


if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

import fdistill_ops as fd  # noqa: E402
from fdistill_ops import _native, divergences  # noqa: E402
from fdistill_ops import _oracle as oracle  # noqa: E402
from fdistill_ops.testing import assert_close, poison  # noqa: E402

# Back end, and the device whose tensors it is tested on. Every test with the ``backend`` fixture runs once for each.
BACKENDS = [("reference", "cpu"), ("cpu", "cpu"), ("cuda-emulated", "cpu")]
BACKENDS += [("cuda", "cuda"), ("triton", "cuda")] if GPU else [("triton", "cpu")]
EMULATED = [(name, device) for name, device in BACKENDS if device == "cpu" and name not in ("reference", "cpu")]

# Without hypothesis the files that need it are skipped, and nothing else.
hypothesis: Any = importlib.import_module("hypothesis") if importlib.util.find_spec("hypothesis") else None


def load_profile(name: str) -> None:
    """The settings of that name for the tests of random examples."""
    checks = hypothesis.HealthCheck
    common: dict[str, Any] = {
        "deadline": None,
        "suppress_health_check": [checks.function_scoped_fixture, checks.too_slow, checks.differing_executors],
    }
    settings = hypothesis.settings
    settings.register_profile("ci", derandomize=True, max_examples=60, database=None, **common)
    settings.register_profile("quick", derandomize=True, max_examples=10, database=None, **common)
    settings.register_profile("explore", max_examples=1000, **common)
    settings.load_profile(name)


def in_threads(*functions: Callable[[], Any]) -> None:
    """Runs them side by side; the first error is raised."""
    errors: list[BaseException] = []

    def run(function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "no_poison: freshly allocated memory is left as it is")
    default = "quick" if config.getoption("--quick") else "ci"
    if hypothesis:
        load_profile(config.getoption("--hypothesis-profile", None) or default)
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of as many processes as there are cores
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help=f"no slow tests, fewer random examples, and of a test's parameters at most {FEW} for each back end",
    )


FEW = 3


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the parameters the first, the last and some between."""
    if not config.getoption("--quick"):
        return
    groups: dict[Any, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            parameters = getattr(item, "callspec", None)
            backend = parameters and parameters.params.get("backend")
            groups.setdefault((item.nodeid.partition("[")[0], backend), []).append(item)
    kept = set()
    for group in groups.values():
        places = range(len(group)) if len(group) <= FEW else [i * (len(group) - 1) // (FEW - 1) for i in range(FEW)]
        kept |= {group[place] for place in places}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


_settings: dict[Any, Any] = {}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fewer examples where GPU kernels run on the CPU."""
    test = getattr(item, "obj", None)
    found = getattr(test, "_hypothesis_internal_use_settings", None)
    if test is None or found is None:
        return
    settings = _settings.setdefault(test, found)
    if getattr(item, "callspec", None) is not None and item.callspec.params.get("backend") in EMULATED:
        settings = hypothesis.settings(settings, max_examples=settings.max_examples // 5)
    test._hypothesis_internal_use_settings = settings


@dataclass(frozen=True)
class Backend:
    """A back end that runs here, and where its tensors live."""

    name: str
    device: str

    @property
    def compiled(self) -> bool:
        """Kernels and operators, not plain PyTorch."""
        return self.name != "reference"

    @property
    def emulated(self) -> bool:
        """GPU kernels on the CPU, far too slowly for large tensors."""
        return (self.name, self.device) in EMULATED

    def tensor(self, value: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(np.asarray(value).tolist(), dtype=torch.float64).to(dtype).to(self.device)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(self.device)

    def leaf(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        return self.randn(*shape, dtype=dtype, seed=seed).requires_grad_()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other are many times slower where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    """Triton's interpreter replaces the functions of its language at every call of a device function, also where that
    is done already: nine tenths of its time."""
    try:
        from triton.language import core
        from triton.runtime import interpreter
    except ImportError:
        return

    def call(self: Any, *arguments: Any, **more: Any) -> Any:
        languages = [v for v in self.fn.__globals__.values() if v is interpreter.tl or v is core]
        if any(core.is_builtin(language.full) for language in languages):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **more)

    interpreter.InterpretedFunction.__call__ = call


def _parameter(name: str, device: str) -> Any:
    return pytest.param((name, device), id=name, marks=[pytest.mark.gpu] if device == "cuda" else [])


@pytest.fixture(params=[_parameter(*entry) for entry in BACKENDS])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Makes each call in the test use one back end."""
    name, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    if name not in fd.available_backends() and not (name == "cuda-emulated" and _native.emulator()):
        pytest.skip(fd.build_info()["unavailable"].get(name, f"the back end {name!r} was not built"))
    with fd.use_backend(name):
        yield Backend(name, device)


@pytest.fixture(autouse=True)
def registered_divergences() -> Iterator[None]:
    """Each test begins with the divergences of the library."""
    tables = (divergences._registry, divergences._aliases)
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        if table != content:
            table.clear()
            table.update(content)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a kernel does not write is NaN."""
    if request.node.get_closest_marker("no_poison"):
        yield
        return
    with poison():
        yield


# ------------------------------------------------------------------------------------------- comparison with the oracle


def to_numpy(value: Any) -> Any:
    """Tensors as float64 (bool for masks) arrays, everything else as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.numpy() if value.dtype is torch.bool else value.double().numpy()


def as_tensor(value: Any) -> Tensor:
    return torch.from_numpy(np.array(value, dtype=np.float64))


def unit(*tensors: Tensor | None) -> float:
    """Unit roundoff of the arithmetic of a loss of these tensors."""
    return oracle.U64 if any(t is not None and t.dtype is torch.float64 for t in tensors) else oracle.U32


def rounding(dtype: torch.dtype) -> float:
    """Ulps of a single rounding: half of one, and for bfloat16 half of one of float32, through which float64 goes."""
    return 0.5 + 2.0**-17 if dtype is torch.bfloat16 else 0.5


def roundings(dtype: torch.dtype) -> float:
    """Ulps of the stored gradient: those of a single rounding; float16 is stored without its scale (which would
    underflow) and rounded again when the scale comes in."""
    return 1.0 if dtype is torch.float16 else rounding(dtype)


def expected_matching(arguments: dict[str, Any], **extra: Any) -> oracle.Loss:
    """The oracle's answer to the arguments of distribution_matching_loss."""
    u = unit(*(arguments.get(name) for name in ("x", "teacher", "fake", "teacher_uncond", "x_t")))
    plain = {name: to_numpy(value) for name, value in arguments.items()}
    return oracle.distribution_matching(**plain, u=u, **extra)


def check_loss(loss: Tensor, expected: oracle.Loss, arguments: dict[str, Any]) -> None:
    """Loss: its dtype, shape and value."""
    is_double = unit(*(arguments.get(name) for name in ("x", "teacher", "fake", "teacher_uncond", "x_t"))) == oracle.U64
    assert loss.dtype is (torch.float64 if is_double else torch.float32)
    assert_close(loss, as_tensor(expected.loss), ulps=1.0, noise=as_tensor(expected.loss_noise), what="loss")


def check_gradient(gradient: Tensor | None, leaf: Tensor, expected: oracle.Loss, name: str = "x") -> None:
    """Gradient for an incoming gradient of ones: its dtype, shape and value."""
    assert gradient is not None, f"no gradient for {name}"
    assert gradient.dtype is leaf.dtype
    assert_close(
        gradient,
        as_tensor(expected.gradients[name]),
        ulps=roundings(leaf.dtype),
        noise=as_tensor(expected.gradient_noise[name]),
        what=f"gradient of {name}",
    )


def check_matching(arguments: dict[str, Any], **extra: Any) -> tuple[Tensor, Tensor]:
    """Calls distribution_matching_loss, compares loss, gradient and g with the oracle; returns loss and gradient."""
    expected = expected_matching(arguments, **extra)
    x = arguments["x"]
    loss = fd.distribution_matching_loss(**arguments)
    check_loss(loss, expected, arguments)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    check_gradient(gradient, x, expected)
    g = fd.score_difference(**{name: value for name, value in arguments.items() if name != "reduction"})
    assert g.dtype is x.dtype
    assert not g.requires_grad
    assert_close(
        g, as_tensor(expected.g), ulps=rounding(g.dtype), noise=as_tensor(expected.g_noise), what="score difference"
    )
    return loss, gradient


def check_identity(arguments: dict[str, Any], alpha: float) -> tuple[Tensor, ...]:
    """Calls score_identity_loss, compares loss, gradients and statistics with the oracle; returns both."""
    inputs = tuple(arguments[name] for name in ("x", "teacher", "fake"))
    plain = {name: to_numpy(value) for name, value in arguments.items()}
    expected = oracle.score_identity(**plain, alpha=alpha, u=unit(*inputs))
    loss, stats = fd.score_identity_loss(**arguments, alpha=alpha, return_stats=True)
    check_loss(loss, expected, arguments)
    gradients = torch.autograd.grad(loss.sum(), inputs)
    for name, leaf, gradient in zip(("x", "teacher", "fake"), inputs, gradients, strict=True):
        # Sums of infinities are NaN or infinite depending on their order.
        bad = ~np.isfinite(expected.gradients[name])
        assert not bool(gradient[torch.from_numpy(bad)].isfinite().any())
        expected.gradients[name] = np.where(bad, 0.0, expected.gradients[name])
        check_gradient(torch.where(torch.from_numpy(bad).to(leaf.device), 0.0, gradient), leaf, expected, name)
    fields = stats.to_dict()
    tolerance = 1e-11 if loss.dtype is torch.float64 else 4e-6
    for name in ("grad_norm", "grad_mean_abs", "normalizer_mean", "weight_max", "nonfinite"):
        assert fields[name] == pytest.approx(expected.stats[name], rel=tolerance, nan_ok=True), name
    return (loss, *gradients)
