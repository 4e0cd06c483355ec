"""Checkpoints in exactly the layout of Medical Diffusion's authors, written without diffaug's networks."""

import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import cos, pi, prod
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]

KEYS = Path(__file__).parent / "keys"
OMEGACONF = {
    "omegaconf.dictconfig": ["DictConfig"],
    "omegaconf.listconfig": ["ListConfig"],
    "omegaconf.base": ["Metadata", "ContainerMetadata"],
    "omegaconf.nodes": ["AnyNode"],
}


def key_list(name: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Key, shape and dtype of each tensor of a real checkpoint, in its order."""
    rows = (
        line.split("\t") for line in (KEYS / f"medicaldiffusion-{name}.keys.txt").read_text().splitlines()
    )
    return [
        (key, tuple(map(int, shape.strip("()").replace(",", " ").split())), kind) for key, shape, kind in rows
    ]


# -- which tensors there are ---------------------------------------------------------------------------------


def vqgan_shapes(
    hidden: int = 4, stages: int = 1, channels: int = 1, latent: int = 4, codes: int = 64
) -> Shapes:
    """The VQ-GAN of an inference checkpoint."""
    shapes: Shapes = {}

    def layer(name: str, *shape: int, bias: int | None = None) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = (shape[0] if bias is None else bias,)

    def block(name: str, width: int) -> None:
        for n in (1, 2):
            layer(f"{name}.norm{n}", width)
            layer(f"{name}.conv{n}.conv", width, width, 3, 3, 3)

    for n in range(stages):
        layer(f"encoder.conv_blocks.{n}.down.conv", hidden * 2 ** (n + 1), hidden * 2**n, 4, 4, 4)
        block(f"encoder.conv_blocks.{n}.res", hidden * 2 ** (n + 1))
    layer("encoder.conv_first.conv", hidden, channels, 3, 3, 3)
    widest = hidden * 2**stages
    layer("encoder.final_block.0", widest)
    layer("decoder.final_block.0", widest)
    inputs = widest
    for n in range(stages):
        outputs = hidden * 2 ** (stages - n)
        layer(f"decoder.conv_blocks.{n}.up.convt", inputs, outputs, 4, 4, 4, bias=outputs)
        block(f"decoder.conv_blocks.{n}.res1", outputs)
        block(f"decoder.conv_blocks.{n}.res2", outputs)
        inputs = outputs
    layer("decoder.conv_last.conv", channels, inputs, 3, 3, 3)
    layer("pre_vq_conv.conv", latent, widest, 1, 1, 1)
    layer("post_vq_conv.conv", widest, latent, 1, 1, 1)
    shapes |= {
        "codebook.embeddings": (codes, latent),
        "codebook.N": (codes,),
        "codebook.z_avg": (codes, latent),
    }
    return shapes


def training_shapes(width: int = 2) -> Shapes:
    """Some of the discriminators and of LPIPS, at a fraction of their size."""
    shapes: Shapes = {}
    for kind, kernel in (("image", (4, 4)), ("video", (4, 4, 4))):
        shapes[f"{kind}_discriminator.model0.0.weight"] = (width, 1, *kernel)
        shapes[f"{kind}_discriminator.model1.1.weight"] = (width,)
        shapes[f"{kind}_discriminator.model1.1.running_mean"] = (width,)
    shapes["perceptual_model.scaling_layer.shift"] = (1, 3, 1, 1)
    shapes["perceptual_model.net.slice1.0.weight"] = (width, 3, 3, 3)
    return shapes


def unet_shapes(
    dim: int = 8,
    mults: tuple[int, ...] = (1, 2),
    channels: int = 4,
    out: int = 4,
    heads: int = 2,
    head: int = 32,
    kernel: int = 7,
) -> Shapes:
    """The U-Net, without the prefix `denoise_fn.`."""
    shapes: Shapes = {}
    rows, time = heads * head, 4 * dim

    def block(name: str, inputs: int, outputs: int, timed: bool = True) -> None:
        if timed:
            shapes[f"{name}.mlp.1.weight"] = (2 * outputs, time)
            shapes[f"{name}.mlp.1.bias"] = (2 * outputs,)
        for n, width in ((1, inputs), (2, outputs)):
            shapes[f"{name}.block{n}.proj.weight"] = (outputs, width, 1, 3, 3)
            for key in ("proj.bias", "norm.weight", "norm.bias"):
                shapes[f"{name}.block{n}.{key}"] = (outputs,)
        if inputs != outputs:
            shapes[f"{name}.res_conv.weight"] = (outputs, inputs, 1, 1, 1)
            shapes[f"{name}.res_conv.bias"] = (outputs,)

    def attention(name: str, width: int, rotary: bool = True) -> None:
        if rotary:
            shapes[f"{name}.fn.fn.fn.rotary_emb.freqs"] = (min(32, head) // 2,)
        shapes[f"{name}.fn.fn.fn.to_qkv.weight"] = (3 * rows, width)
        shapes[f"{name}.fn.fn.fn.to_out.weight"] = (width, rows)
        shapes[f"{name}.fn.norm.gamma"] = (1, width, 1, 1, 1)

    def level(name: str, inputs: int, outputs: int, resized: bool) -> None:
        block(f"{name}.0", inputs, outputs)
        block(f"{name}.1", outputs, outputs)
        shapes[f"{name}.2.fn.fn.to_qkv.weight"] = (3 * heads * 32, outputs, 1, 1)
        shapes[f"{name}.2.fn.fn.to_out.weight"] = (outputs, heads * 32, 1, 1)
        shapes[f"{name}.2.fn.fn.to_out.bias"] = (outputs,)
        shapes[f"{name}.2.fn.norm.gamma"] = (1, outputs, 1, 1, 1)
        attention(f"{name}.3", outputs)
        if resized:
            shapes[f"{name}.4.weight"] = (outputs, outputs, 1, 4, 4)
            shapes[f"{name}.4.bias"] = (outputs,)

    shapes["time_rel_pos_bias.relative_attention_bias.weight"] = (32, heads)
    shapes["init_conv.weight"] = (dim, channels, 1, kernel, kernel)
    shapes["init_conv.bias"] = (dim,)
    attention("init_temporal_attn", dim)
    for n, inputs in ((1, dim), (3, time)):
        shapes[f"time_mlp.{n}.weight"] = (time, inputs)
        shapes[f"time_mlp.{n}.bias"] = (time,)
    widths = [dim, *(dim * m for m in mults)]
    pairs = list(pairwise(widths))
    for n, (inputs, outputs) in enumerate(pairs):
        level(f"downs.{n}", inputs, outputs, n < len(pairs) - 1)
    for n, (inputs, outputs) in enumerate(reversed(pairs)):
        level(f"ups.{n}", 2 * outputs, inputs, n < len(pairs) - 1)
    block("mid_block1", widths[-1], widths[-1])
    attention("mid_spatial_attn", widths[-1], rotary=False)
    attention("mid_temporal_attn", widths[-1])
    block("mid_block2", widths[-1], widths[-1])
    block("final_conv.0", 2 * dim, dim, timed=False)
    shapes["final_conv.1.weight"] = (out, dim, 1, 1, 1)
    shapes["final_conv.1.bias"] = (out,)
    return shapes


# -- what is in them -----------------------------------------------------------------------------------------


def fill(shapes: Shapes, seed: int = 0) -> State:
    """Random weights of about unit gain; norms, rotary frequencies and counts as a real network has them."""
    generator = torch.Generator().manual_seed(seed)
    state = OrderedDict()
    for key, shape in shapes.items():
        if key.endswith("freqs"):
            count = shape[0]
            state[key] = torch.tensor([10000.0 ** (-k / count) for k in range(count)])
        elif key.endswith("codebook.N"):
            # A quarter of the codes is hardly used.
            state[key] = torch.where(torch.arange(shape[0]) % 4 == 3, 0.1, 40.0)
        else:
            fan_in = prod(shape[1:]) if len(shape) > 1 else 1
            state[key] = torch.randn(shape, generator=generator) * fan_in**-0.5
            if len(shape) == 1 and key.endswith("weight"):
                state[key] = 1 + 0.1 * state[key]
            elif key.endswith("gamma"):
                state[key] = torch.ones(shape)
            elif key.endswith("bias") and len(shape) == 1:
                state[key] *= 0.1
    return state


def vqgan_state(seed: int = 0, **sizes: int) -> State:
    """The VQ-GAN as it lies in checkpoints; a code that is hardly used has the codebook's largest number."""
    state = fill(vqgan_shapes(**sizes), seed)
    state["codebook.embeddings"] = state["codebook.embeddings"].clamp(-1.4, 1.4)
    state["codebook.embeddings"][3, 0] = 2.5
    state |= fill(training_shapes(), seed)
    return state


def schedule(steps: int) -> State:
    """The twelve tables of the cosine schedule."""
    share = [cos((x / steps + 0.008) / 1.008 * pi / 2) ** 2 for x in range(steps + 1)]
    betas = torch.tensor([min(0.9999, 1 - b / a) for a, b in pairwise(share)], dtype=torch.float64)
    a = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1), a[:-1]]).double()
    variance = betas * (1 - before) / (1 - a)
    tables = {
        "betas": betas,
        "alphas_cumprod": a,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": a**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - a) ** 0.5,
        "log_one_minus_alphas_cumprod": torch.log(1 - a),
        "sqrt_recip_alphas_cumprod": (1 / a) ** 0.5,
        "sqrt_recipm1_alphas_cumprod": (1 / a - 1) ** 0.5,
        "posterior_variance": variance,
        "posterior_log_variance_clipped": torch.log(variance.clamp(min=1e-20)),
        "posterior_mean_coef1": betas * before**0.5 / (1 - a),
        "posterior_mean_coef2": (1 - before) * (1 - betas) ** 0.5 / (1 - a),
    }
    return {name: table.float() for name, table in tables.items()}


def diffusion_state(vqgan: State, steps: int = 4, seed: int = 1, **sizes: Any) -> State:
    """The state dict of the whole second stage."""
    state = OrderedDict(schedule(steps))
    state |= {f"denoise_fn.{key}": tensor for key, tensor in fill(unet_shapes(**sizes), seed).items()}
    state |= {f"vqgan.{key}": tensor for key, tensor in vqgan.items()}
    return state


# -- files ---------------------------------------------------------------------------------------------------


@contextmanager
def stand_in_omegaconf() -> Iterator[dict[str, type]]:
    """Classes that pickle as omegaconf's do, in modules that exist inside the block."""
    classes: dict[str, type] = {}
    modules = {"omegaconf": ModuleType("omegaconf")} | {name: ModuleType(name) for name in OMEGACONF}
    for module, names in OMEGACONF.items():
        for name in names:
            classes[name] = type(name, (), {"__module__": module})
            setattr(modules[module], name, classes[name])
    saved = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield classes
    finally:
        for name, module_before in saved.items():
            del sys.modules[name]
            if module_before is not None:
                sys.modules[name] = module_before


def configuration(value: Any, classes: dict[str, type], parent: Any = None) -> Any:
    """Dicts, lists and leaves as omegaconf keeps them; every node knows its parent."""
    node_class = {dict: "DictConfig", list: "ListConfig"}.get(type(value), "AnyNode")
    node = classes[node_class]()
    metadata = classes["Metadata" if node_class == "AnyNode" else "ContainerMetadata"]()
    vars(metadata).update(ref_type=Any, object_type=None, optional=True, key=None, flags={}, flags_root=False)
    vars(metadata)["resolver_cache"] = defaultdict(dict)
    vars(node).update(_metadata=metadata, _parent=parent)
    if node_class == "AnyNode":
        vars(node)["_val"] = value
        return node
    vars(metadata).update(
        object_type=type(value), key_type=int if type(value) is list else Any, element_type=Any
    )
    if type(value) is dict:
        content: Any = {key: configuration(item, classes, node) for key, item in value.items()}
    else:
        content = [configuration(item, classes, node) for item in value]
    vars(node)["_content"] = content
    return node


def model_configuration(**changes: Any) -> dict[str, Any]:
    """The `cfg` of a small VQ-GAN; `changes` are in its `model`."""
    model = {
        "embedding_dim": 4,
        "n_codes": 64,
        "n_hiddens": 4,
        "lr": 1.875e-5,
        "downsample": [2, 2, 2],
        "norm_type": "group",
        "padding_type": "replicate",
        "num_groups": 4,
        "default_root_dir": None,
    }
    dataset = {"name": "MRNet", "root_dir": "/home/somebody/mrnet", "image_channels": 1}
    return {"model": model | changes, "dataset": dataset}


def write_ckpt(
    path: Path, state: State, cfg: dict[str, Any] | None = None, *, legacy: bool = False, **entries: Any
) -> Path:
    """What pytorch-lightning 1.6.4 writes of a VQ-GAN, with the configuration in omegaconf's classes."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
    with stand_in_omegaconf() as classes:
        torch.save(
            {
                "epoch": 126,
                "global_step": 114000,
                "pytorch-lightning_version": "1.6.4",
                "state_dict": OrderedDict(state),
                "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 127}}}},
                "callbacks": {
                    "ModelCheckpoint{'monitor': 'val/recon_loss', 'mode': 'min'}": {
                        "best_model_score": torch.tensor(0.47),
                        "best_k_models": {"/home/somebody/a.ckpt": torch.tensor(0.47)},
                    }
                },
                "optimizer_states": [optimizer.state_dict(), optimizer.state_dict()],
                "lr_schedulers": [],
                "NativeMixedPrecisionPlugin": {"scale": 65536.0, "growth_interval": 2000},
                "hparams_name": "kwargs",
                "hyper_parameters": {"cfg": configuration(cfg or model_configuration(), classes)},
            }
            | entries,
            path,
            _use_new_zipfile_serialization=not legacy,
        )
    return path


def write_pt(
    path: Path, ema: State, model: State | None = None, *, legacy: bool = False, **entries: Any
) -> Path:
    """What the second stage's trainer writes."""
    torch.save(
        {"step": 78000, "model": ema if model is None else model, "ema": ema, "scaler": {}} | entries,
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    return path
