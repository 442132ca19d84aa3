"""Back ends under test, poisoned allocations, and the comparison of a call with the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

import fdistill_ops as fd
from fdistill_ops.testing import assert_close, poison

# Back end, and the device whose tensors it is tested on. Every test with the ``backend`` fixture runs once for each.
BACKENDS = [("reference", "cpu"), ("cpu", "cpu"), ("cuda-emulated", "cpu"), ("cuda", "cuda")]

_COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.differing_executors,
    ],
}
hypothesis.settings.register_profile("ci", derandomize=True, max_examples=60, database=None, **_COMMON)
hypothesis.settings.register_profile("explore", max_examples=1000, **_COMMON)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "no_poison: freshly allocated memory is left as it is")
    hypothesis.settings.load_profile(config.getoption("--hypothesis-profile", None) or "ci")


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
        return self.compiled and self.name != self.device

    def tensor(self, value: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(np.asarray(value).tolist(), dtype=torch.float64).to(dtype).to(self.device)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(self.device)

    def leaf(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        return self.randn(*shape, dtype=dtype, seed=seed).requires_grad_()


def _parameter(name: str, device: str) -> Any:
    return pytest.param((name, device), id=name, marks=[pytest.mark.gpu] if device == "cuda" else [])


@pytest.fixture(params=[_parameter(*entry) for entry in BACKENDS])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Makes each call in the test use one back end."""
    name, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    if name not in fd.available_backends():
        pytest.skip(f"the back end {name!r} does not run here: {fd.build_info().get('reason')}")
    with fd.use_backend(name):
        yield Backend(name, device)


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


def roundings(dtype: torch.dtype) -> float:
    """Ulps of the stored gradient: half of one for a single rounding; float16 is stored without its scale (which would
    underflow) and rounded again when the scale comes in."""
    return 1.0 if dtype is torch.float16 else 0.5


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
    assert_close(g, as_tensor(expected.g), ulps=0.5, noise=as_tensor(expected.g_noise), what="score difference")
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
