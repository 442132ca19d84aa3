"""The code bases under test: where they are imported from, and stand-ins for what their losses need of a model.

Networks and noise schedulers are :class:`Canned`: they give fixed tensors whatever they see, so that the same code runs
on the same numbers in one dtype and, for comparison, in float64.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fdistill_ops as fd
from fdistill_ops import _ops
from fdistill_ops.integrations import causvid, dmd2, fastgen, fastvideo, self_forcing, sid

RESTATED = Path(__file__).resolve().parent / "codebases"
CHECKOUTS = os.environ.get("FDISTILL_CODEBASES")
SOURCES = ["restated"] + (["checkouts"] if CHECKOUTS else [])

# Third-party and heavy modules that the code bases import and their losses do not use.
_HEAVY = {
    "FastGen": (
        *("loguru", "omegaconf", "hydra", "wandb", "webdataset", "fastgen.utils.logging_utils"),
        *("fastgen.utils.registry", "fastgen.utils.basic_utils", "fastgen.networks", "fastgen.configs"),
        *("fastgen.methods.model", "fastgen.methods.consistency_model", "fastgen.methods.knowledge_distillation"),
    ),
    "DMD2": ("diffusers", "dnnlib", "transformers", "imageio", "main.sd_unet_forward", "main.edm.edm_network"),
    "CausVid": ("causvid.models", "causvid.loss"),
    "Self-Forcing": ("pipeline", "utils", "einops"),
    "SiD": ("dnnlib",),
    "FastVideo": (
        *("imageio", "torchvision", "einops", "torchdata", "wandb", "tqdm"),
        *(f"fastvideo.{name}" for name in ("api", "configs", "dataset", "distributed", "entrypoints", "envs")),
        *(f"fastvideo.{name}" for name in ("fastvideo_args", "forward_context", "logger", "models", "pipelines")),
        *(f"fastvideo.{name}" for name in ("platforms", "utils", "version", "attention", "layers")),
        *(f"fastvideo.train.{name}" for name in ("trainer", "models", "callbacks", "entrypoint")),
        *(f"fastvideo.train.methods.distribution_matching.{name}" for name in ("anyflow", "anyflow_pretrain")),
        "fastvideo.train.methods.distribution_matching.streaming_long_tuning",
        *(f"fastvideo.train.utils.{name}" for name in ("checkpoint", "optimizer")),
        *(f"fastvideo.training.{name}" for name in ("activation_checkpoint", "checkpointing_utils", "trackers")),
        *(f"fastvideo.training.{name}" for name in ("training_pipeline", "training_utils", "wan_training_pipeline")),
        "fastvideo.training.ltx2_training_pipeline",
    ),
}
_PACKAGES = (
    "fastgen",
    "fastvideo",
    "main",
    "causvid",
    "model",
    "training",
    "torch_utils",
    *{n for h in _HEAVY.values() for n in h},
)


class _Empty(ModuleType):
    """A module with whatever is asked of it."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {"__init__": lambda self, *_, **__: torch.nn.Module.__init__(self)})


class _EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(name == known or name.startswith(f"{known}.") for known in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


_imported: dict[tuple[str, str], dict[str, ModuleType]] = {}


def _loaded() -> dict[str, ModuleType]:
    return {
        name: module
        for name, module in sys.modules.items()
        if any(name == known or name.startswith(f"{known}.") for known in _PACKAGES)
    }


@contextlib.contextmanager
def importable(project: str, source: str) -> Iterator[None]:
    """Makes a code base importable: as "restated", from "checkouts", or (anything else) not. Afterwards nothing of it
    is left in sys.modules. Its modules are run once."""
    before, path, finders = _loaded(), list(sys.path), list(sys.meta_path)
    for name in before:
        del sys.modules[name]
    sys.modules.update(_imported.get((project, source), {}))
    if source == "restated":
        sys.path.insert(0, str(RESTATED / project))
    elif source == "checkouts":
        sys.path.insert(0, str(Path(str(CHECKOUTS)) / project))
        sys.meta_path.insert(0, _EmptyModules(_HEAVY[project]))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        _imported[project, source] = _loaded()
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(before)
        sys.path[:], sys.meta_path[:] = path, finders


# ----------------------------------------------------------------------------------------------------------- stand-ins


class Canned(torch.nn.Module):
    """A network that gives its outputs in turn, and remembers what it saw."""

    def __init__(self, *outputs: Any) -> None:
        super().__init__()
        self.outputs, self.seen = outputs, []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((args, kwargs if torch.compiler.is_compiling() else dict(sorted(kwargs.items()))))
        return self.outputs[(len(self.seen) - 1) % len(self.outputs)]


class Noisy:
    """A noise scheduler whose noisy samples are known beforehand."""

    def __init__(self, noisy: Tensor) -> None:
        self.noisy, self.seen = noisy, []

    def add_noise(self, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        self.seen.append(((samples, noise, timesteps), {}))
        return self.noisy


def bare(cls: type, **attributes: Any) -> Any:
    """An instance of a module class without its constructor's networks."""
    model = cls.__new__(cls)
    torch.nn.Module.__init__(model)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


@dataclass
class Model:
    """A code base's loss of one model: ``loss(x)`` gives the loss and the log. ``leaves``: other tensors that its
    gradient flows to; ``seen()``: what networks and scheduler were called with."""

    loss: Callable[[Tensor], tuple[Tensor, dict[str, Any]]]
    leaves: list[Tensor] = field(default_factory=list)
    parts: list[Any] = field(default_factory=list)

    def seen(self) -> list[Any]:
        return [part.seen for part in self.parts]


@dataclass(frozen=True)
class Case:
    """One loss of one code base. ``build(tensors)`` makes the model from the named tensors that ``names`` lists."""

    name: str
    project: str
    integration: Any
    names: tuple[str, ...]
    build: Callable[[dict[str, Tensor]], Model]
    shape: tuple[int, ...] = (4, 4, 16, 16)

    def tensors(self, dtype: torch.dtype, closeness: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
        """Random samples and predictions in that dtype; the predictions differ by ``closeness`` times as much as the
        samples from them."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=generator)
        target = x + torch.randn(self.shape, generator=generator)
        named = {name: target + closeness * torch.randn(self.shape, generator=generator) for name in self.names}
        return {name: tensor.to(dtype) for name, tensor in ({"x": x} | named).items()}


def _fastgen(weighted: bool) -> Callable[[dict[str, Tensor]], Model]:
    def build(tensors: dict[str, Tensor]) -> Model:
        module = importlib.import_module("fastgen.methods.distribution_matching.f_distill")
        h = torch.tensor([0.25, 2.0, 1.0, 0.75]).to(tensors["teacher"].dtype) if weighted else None

        def loss(x: Tensor) -> tuple[Tensor, dict[str, Any]]:
            function = module.variational_score_distillation_loss
            return function(x, tensors["teacher"], tensors["fake"], additional_scale=h), {}

        return Model(loss)

    return build


ALPHAS_CUMPROD = torch.linspace(0.9991, 0.0047, 1000)


def _dmd2_sd(scale: float, sdxl: bool) -> Callable[[dict[str, Tensor]], Model]:
    def build(tensors: dict[str, Tensor]) -> Model:
        guidance = importlib.import_module("main.sd_guidance").SDGuidance
        real = [tensors["real"]] if scale <= 1 else [torch.cat([tensors["uncond"], tensors["real"]])]
        dtype = tensors["real"].dtype
        model = bare(
            guidance,
            real_unet=Canned(*(SimpleNamespace(sample=noise) for noise in real)),
            fake_unet=Canned(SimpleNamespace(sample=tensors["fake"])),
            scheduler=Noisy(tensors["noisy"]),
            alphas_cumprod=ALPHAS_CUMPROD,
            num_train_timesteps=1000,
            min_step=20,
            max_step=980,
            real_guidance_scale=scale,
            fake_guidance_scale=1,
            use_fp16=dtype is torch.bfloat16,
            sdxl=sdxl,
        )
        text, uncond = (torch.full((4, 7, 5), value) for value in (1.0, -1.0))
        added = [{"time_ids": torch.full((4, 6), value)} if sdxl else None for value in (0.5, -0.5)]

        def loss(x: Tensor) -> tuple[Tensor, dict[str, Any]]:
            losses, log = model.compute_distribution_matching_loss(x, text, uncond, *added)
            return losses["loss_dm"], log

        return Model(loss, parts=[model.scheduler, model.fake_unet, model.real_unet])

    return build


def _dmd2_edm(tensors: dict[str, Tensor]) -> Model:
    guidance = importlib.import_module("main.edm.edm_guidance").EDMGuidance
    dtype = tensors["real"].dtype
    model = bare(
        guidance,
        real_unet=Canned(tensors["real"]),
        fake_unet=Canned(tensors["fake"]),
        karras_sigmas=torch.linspace(0.002, 80, 1000).to(dtype),
        num_train_timesteps=1000,
        min_step=20,
        max_step=980,
    )

    def loss(x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        losses, log = model.compute_distribution_matching_loss(x, torch.ones(4, 10))
        return losses["loss_dm"], log

    return Model(loss, parts=[model.real_unet, model.fake_unet])


def _first_frames_off(x: Tensor) -> Tensor:
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[:, :2] = False
    return mask


def _video(module: str, cls: str, masked: bool = False, **settings: Any) -> Callable[[dict[str, Tensor]], Model]:
    """CausVid's and Self-Forcing's classes; the latter's networks give (flow, x0)."""

    def build(tensors: dict[str, Tensor]) -> Model:
        model_class = getattr(importlib.import_module(module), cls)
        leaves = []
        if cls == "SiD":
            leaves = [tensors[name].requires_grad_() for name in ("real", "uncond", "fake")]

        def network(*names: str) -> Canned:
            outputs = [tensors[name] for name in names]
            return Canned(*(outputs if module == "causvid.dmd" else [(None, output) for output in outputs]))

        model = bare(
            model_class,
            real_score=network("real", "uncond"),
            fake_score=network("fake", "fake_uncond") if "fake_uncond" in tensors else network("fake"),
            scheduler=Noisy(tensors["noisy"].flatten(0, 1)),
            device="cpu",
            num_train_timestep=1000,
            min_step=20,
            max_step=980,
            num_frame_per_block=2,
            min_score_timestep=0,
            real_guidance_scale=3.5,
            **({"fake_guidance_scale": 1.5 if "fake_uncond" in tensors else 0.0, "ts_schedule": True} | settings),
        )
        bounds = {}
        if settings.get("ts_schedule_max"):
            bounds = {"denoised_timestep_from": 800, "denoised_timestep_to": 100}

        def loss(x: Tensor) -> tuple[Tensor, dict[str, Any]]:
            mask = _first_frames_off(x) if masked else None
            return model.compute_distribution_matching_loss(x, {"text": 1}, {"text": 0}, mask, **bounds)

        return Model(loss, leaves, [model.scheduler, model.fake_score, model.real_score])

    return build


def _sid(tensors: dict[str, Tensor]) -> Model:
    loss_fn = importlib.import_module("training.sid_loss").SID_EDMLoss()
    leaves = [tensors[name].requires_grad_() for name in ("real", "fake")]
    networks = [Canned(tensor) for tensor in leaves]

    def loss(x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return loss_fn.generator_loss(*networks, x, labels=None, augment_pipe=None, alpha=1.2, tmax=800).sum(), {}

    return Model(loss, leaves, networks)


class Stub:
    """Whatever attributes it is given."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def _fastvideo(cls: str, scale: float | None) -> Callable[[dict[str, Tensor]], Model]:
    module = {"DMD2Method": "dmd2", "SelfForcingMethod": "self_forcing"}[cls]

    def build(tensors: dict[str, Tensor]) -> Model:
        found = importlib.import_module(f"fastvideo.train.methods.distribution_matching.{module}")
        critic, teacher = Canned(tensors["fake"]), Canned(tensors["real"], tensors["uncond"])
        scheduler = Noisy(tensors["noisy"])

        def move(timestep: Tensor) -> Tensor:
            return (3 * timestep).clamp(20, 980)

        add_noise = scheduler.add_noise
        method = bare(
            getattr(found, cls),
            student=Stub(num_train_timesteps=1000, shift_and_clamp_timestep=move, add_noise=add_noise),
            critic=Stub(predict_x0=critic),
            teacher=Stub(predict_x0=teacher),
            method_config={"real_score_guidance_scale": scale},
            cuda_generator=None,
            _cfg_uncond=None,
            _score_min_timestep=100,
            _score_max_timestep=900,
            _sf_add_noise=add_noise,
            _predict_x0_with_scheduler=lambda model, *args, **kwargs: model.predict_x0(*args, **kwargs),
        )
        return Model(lambda x: (method._dmd_loss(x, "batch"), {}), parts=[scheduler, critic, teacher])

    return build


def _shift(timestep: Tensor, shift: float, steps: float) -> Tensor:
    return steps * (shift * (timestep / steps) / (1 + (shift - 1) * (timestep / steps)))


def _to_x0(pred_noise: Tensor, noise_input_latent: Tensor, timestep: Tensor, scheduler: Any) -> Tensor:
    image = noise_input_latent.double() - timestep.double() / 1000 * pred_noise.double()
    return image.to(pred_noise.dtype)


def _fastvideo_pipeline(tensors: dict[str, Tensor]) -> Model:
    module: Any = importlib.import_module("fastvideo.training.distillation_pipeline")
    module.shift_timestep, module.pred_noise_to_pred_video = _shift, _to_x0  # whatever the checkout has
    fake, *real = (Canned(tensors[name].permute(0, 2, 1, 3, 4)) for name in ("fake", "real", "uncond"))
    transformer = Canned(real[0].outputs[0], real[1].outputs[0])
    scheduler = Noisy(tensors["noisy"].flatten(0, 1))
    batch = Stub(
        conditional_dict={"a": 1}, unconditional_dict={"a": 0}, latents=tensors["real"], dmd_latent_vis_dict={}
    )

    def build(noisy: Tensor, timestep: Tensor, condition: Any, training_batch: Any) -> Any:
        training_batch.input_kwargs = {"hidden_states": noisy, "timestep": timestep, **condition}
        return training_batch

    pipeline = Stub(
        num_train_timestep=1000,
        device="cpu",
        timestep_shift=5.0,
        min_timestep=20,
        max_timestep=980,
        video_latent_shape=tensors["x"].shape,
        noise_scheduler=scheduler,
        real_score_guidance_scale=3.5,
        _build_distill_input_kwargs=build,
        _get_fake_score_transformer=lambda timestep: fake,
        _get_real_score_transformer=lambda timestep: transformer,
    )

    def loss(x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        value = module.DistillationPipeline._dmd_forward(pipeline, generator_pred_video=x, training_batch=batch)
        return value, dict(batch.dmd_latent_vis_dict)

    return Model(loss, parts=[scheduler, fake, transformer])


_SD = ("noisy", "real", "uncond", "fake")
_VIDEO = (2, 6, 4, 8, 8)
CASES = [
    Case("fastgen", "FastGen", fastgen, ("teacher", "fake"), _fastgen(False)),
    Case("fastgen weighted", "FastGen", fastgen, ("teacher", "fake"), _fastgen(True)),
    Case("dmd2 sd", "DMD2", dmd2, _SD, _dmd2_sd(1.0, False)),
    Case("dmd2 sd guided", "DMD2", dmd2, _SD, _dmd2_sd(7.5, False)),
    Case("dmd2 sdxl guided", "DMD2", dmd2, _SD, _dmd2_sd(8.0, True)),
    Case("dmd2 edm", "DMD2", dmd2, ("real", "fake"), _dmd2_edm),
    Case(
        "causvid",
        "CausVid",
        causvid,
        _SD,
        _video("causvid.dmd", "DMD", timestep_shift=8.0, real_task_type="causal_video"),
        _VIDEO,
    ),
    Case(
        "causvid masked",
        "CausVid",
        causvid,
        _SD,
        _video("causvid.dmd", "DMD", True, timestep_shift=1.0, real_task_type="bidirectional_video"),
        _VIDEO,
    ),
    Case(
        "self-forcing dmd",
        "Self-Forcing",
        self_forcing,
        _SD,
        _video("model.dmd", "DMD", timestep_shift=5.0, ts_schedule_max=True),
        _VIDEO,
    ),
    Case(
        "self-forcing dmd masked, fake guided",
        "Self-Forcing",
        self_forcing,
        (*_SD, "fake_uncond"),
        _video("model.dmd", "DMD", True, timestep_shift=5.0, ts_schedule_max=False),
        _VIDEO,
    ),
    Case(
        "self-forcing causvid",
        "Self-Forcing",
        self_forcing,
        _SD,
        _video("model.causvid", "CausVid", timestep_shift=1.0),
        _VIDEO,
    ),
    Case(
        "self-forcing sid",
        "Self-Forcing",
        self_forcing,
        _SD,
        _video("model.sid", "SiD", timestep_shift=5.0, ts_schedule_max=True, sid_alpha=1.1),
        _VIDEO,
    ),
    Case("sid", "SiD", sid, ("real", "fake"), _sid),
    Case("fastvideo dmd2", "FastVideo", fastvideo, _SD, _fastvideo("DMD2Method", 3.5), _VIDEO),
    Case("fastvideo dmd2 unguided", "FastVideo", fastvideo, _SD, _fastvideo("DMD2Method", None), _VIDEO),
    Case("fastvideo self-forcing", "FastVideo", fastvideo, _SD, _fastvideo("SelfForcingMethod", 3.0), _VIDEO),
    Case("fastvideo pipeline", "FastVideo", fastvideo, _SD, _fastvideo_pipeline, (1, *_VIDEO[1:])),
]


# ---------------------------------------------------------------------------------------------------------- comparison


@dataclass
class Result:
    loss: Tensor
    gradients: list[Tensor]
    log: dict[str, Any]
    seen: list[Any]
    random: Tensor  # drawn afterwards: where the random numbers stand


def run(case: Case, tensors: dict[str, Tensor], seed: int = 1) -> Result:
    """The loss and its gradients with respect to x and the leaves."""
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    model = case.build(tensors)
    x = tensors["x"].requires_grad_()
    torch.manual_seed(seed)
    loss, log = model.loss(x)
    gradients = torch.autograd.grad(loss, [x, *model.leaves])
    return Result(loss.detach(), list(gradients), log, model.seen(), torch.rand(3))


class _InFloat64(TorchFunctionMode):
    """What code rounds to float32 or below on purpose stays float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        elif func is Tensor.to:
            narrow = (torch.float32, torch.bfloat16)
            args = (args[0], *(torch.float64 if arg in narrow else arg for arg in args[1:]))
        return func(*args, **(kwargs or {}))


def in_float64(case: Case, tensors: dict[str, Tensor], seed: int = 1) -> Result:
    """What the code base computes of these tensors where nothing is rounded to less than float64."""
    with _InFloat64():
        return run(case, {name: tensor.double() for name, tensor in tensors.items()}, seed)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of a tensor in the L2 norm."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


class Operators(TorchDispatchMode):
    """What runs in the block: operators (each a kernel launch or more on a GPU), the bytes of the tensors they make,
    and the operators for which the host waits. Ours run as they do where nobody watches, and count one each."""

    _VIEWS = (
        *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "squeeze", "t"),
        *("transpose", "unbind", "unsqueeze", "view", "_unsafe_view"),
    )
    _WAITS = ("_local_scalar_dense", "bincount", "equal", "masked_select", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes = 0, 0
        self.waits: list[str] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Operators:
        self._stack.enter_context(mock.patch.object(_ops, "_traced", lambda *operands: False))
        if "cpu" in fd.available_backends():
            kernels = importlib.import_module("fdistill_ops.backends.cpu").Cpu
            for name in ("run_loss", "run_weights"):
                self._stack.enter_context(mock.patch.object(kernels, name, self._counted(getattr(kernels, name))))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def _counted(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return kernel(*args, **kwargs)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name in self._VIEWS:
            return result
        self.count += "empty" not in name  # no launch
        indices = args[1] if name in ("index", "index_put_") else ()
        if name in self._WAITS or any(i is not None and i.dtype is torch.bool for i in indices):
            self.waits.append(name)
        if not name.endswith("_"):
            self.bytes += sum(t.numel() * t.itemsize for t in tree_leaves(result) if isinstance(t, Tensor))
        return result
