"""Awkward files of weights: what converts must be, bit for bit, what the plain file converts to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ppflow_jax.autoencoders.autoencoder import Autoencoder
from ppflow_jax.autoencoders.taesd import TAESDConfig
from ppflow_jax.convert.autoencoder_keys import autoencoder_state
from ppflow_jax.pyramid import PPFLOW2
from tests.acceptance.case import Case
from tests.acceptance.weight_files import (
    FSDP,
    MODEL,
    QKV,
    VAE,
    Maker,
    inside,
    make_index,
    model_state,
    under,
    vae_state,
)
from tests.convert.pickles import Op, built, call, name, op, storage, tensor


def cases(root: Path) -> list[Case]:
    """Every file, written below `root`, with the outcome of converting it."""
    maker = Maker(root)
    for add in (_wrapped, _entries, _beside, _objects, _tensors, _float8, _shards, _autoencoders):
        add(maker)
    return maker.cases


def _wrapped(make: Maker) -> None:
    for wrapper in (
        *("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "model"),
        *("net", "ema_model", "first_stage_model", "vae", "module._orig_mod", "_orig_mod.module"),
        *("module.module.module", "model.net.vae", "ema_model.module._orig_mod", FSDP),
        *("_forward_module.module", "pl_module.denoiser", "a.b.c.d.e"),
    ):
        title = f"wrapped in {wrapper}"
        make.good(title, make.safetensors(title, under(wrapper, make.sit)), says="sit from")
    for where, pattern in (("blocks", r"^(blocks\.\d+)"), ("attn", r"(\.attn)"), ("fc1", r"(fc1)")):
        for wrapper in ("_checkpoint_wrapped_module", FSDP, "module", "_orig_mod.module"):
            title = f"{wrapper} inside after {where}"
            state = inside(wrapper, under("module", make.sit), pattern.replace("^", r"^module\."))
            if where == "blocks":
                state = under("module", inside(wrapper, make.sit, pattern))
            make.good(title, make.torch(title, {"model": state}), says="removed from names: ")
    some = {f"module.{k}" if n % 2 else k: v for n, (k, v) in enumerate(make.sit.items())}
    make.good("every other name wrapped", make.safetensors("every other", some))
    twice = {**under("module", make.sit), QKV: make.other[QKV]}
    source = make.safetensors("two tensors of one name", twice)
    make.bad("two tensors of one name", source, rf"module\.{QKV}.*--entry or --prefix")
    make.good("one of two by --prefix", source, "--heads=2", "--prefix=module", says="left out")


def _entries(make: Maker) -> None:
    sit, other = make.sit, make.other
    for entry in (
        *("model_state_dict", "ema_state_dict", "state_dict", "ema_model", "net", "params"),
        *("module", "ema", "model", "weights"),
    ):
        title = f"entry {entry}"
        make.good(title, make.torch(title, {entry: sit, "epoch": 3}), says=f"from '{entry}'")
    nested = make.torch(
        "nested", {"state": {"model": under("module", sit), "opt": {"x": np.ones(3)}}}
    )
    make.good("entry in an entry", nested, says=r"left out: state\.opt \(1 tensor\)")
    lightning = {
        "state_dict": {**under("model", other), **under("ema", sit)},
        "optimizer_states": [{"state": {0: {"exp_avg": np.ones(3, "f4")}}}],
        "hyper_parameters": {"lr": 1e-4},
    }
    both = make.torch("lightning", lightning)
    make.good("Lightning's EMA", both, says=r"state_dict\.model \(\d+ tensors\), optimizer_states")
    for flags in (
        ("--weights=model",),
        ("--entry=state_dict.model",),
        ("--prefix=state_dict.model",),
    ):
        make.good(f"Lightning {flags[0]}", both, "--heads=2", *flags, same="other")
    make.bad("Lightning, another entry", both, "begins with 'net'.*state_dict", "--entry=net")
    deepspeed = {"module": sit, "optimizer": {"fp32": np.ones(3, "f4")}, "shapes": [np.ones(2)]}
    make.good("DeepSpeed", make.torch("deepspeed", deepspeed), says=r"optimizer .*shapes")
    averaged = {"model": other, "ema": {"n_averaged": np.array(7), **under("module", sit)}}
    make.good("AveragedModel", make.torch("averaged", averaged), says=r"ema\.n_averaged[;,\n]")
    online = {
        "ema": {**under("online_model", other), **under("ema_model", sit), "step": np.ones(1)}
    }
    make.good("ema_pytorch", make.torch("ema pytorch", online), says=r"from 'ema\.ema_model'")
    two = make.torch("two models", {"model": sit, "teacher": other})
    make.bad("two models", two, "a sit in model and a sit in teacher: say which with --entry=")
    make.good("two models, one asked for", two, "--heads=2", "--entry=teacher", same="other")
    emas = make.torch("two emas", {"ema_a": sit, "ema_b": other, "model": other})
    make.bad("two EMAs", emas, "--entry=ema_a or --entry=ema_b")
    make.bad("no such weights", two, "has no 'ema' weights", "--weights=ema")
    ldm = make.torch("ldm", {**under("model.diffusion_model", sit), **under("vae", vae_state())})
    make.bad("SiT and VAE", ldm, "--kind=sit or --kind=vae")
    make.good("SiT of SiT and VAE", ldm, "--heads=2", "--kind=sit", says=r"vae \(\d+ tensors\)")
    grads = make.torch("gradients", {"model": sit, "grads": other, "opt": {"exp_avg": other}})
    make.good("gradients and moments by name", grads, says="left out: grads")


def _beside(make: Maker) -> None:
    sit = make.sit
    counters = {"n_averaged": np.array(3), "decay": np.array(0.9), "step": np.array([4])}
    source = make.safetensors("counters", {**sit, **counters})
    make.good("counters beside the weights", source, says="decay, n_averaged, step|n_averaged")
    projectors = {f"projectors.0.{k}.weight": np.ones((2, 2), "f4") for k in (0, 2, 4)}
    repa = make.torch("repa", {"ema": {**sit, **projectors}, "steps": 7})
    make.good("REPA's projectors", repa, says=r"ema\.projectors \(3 tensors\).*other way round")
    sra = make.torch("sra", {"ema": under("module", {**sit, "ap_head.0.bias": np.ones(2, "f4")})})
    make.good("SRA's head", sra, says="ap_head")
    for key in ("head.weight", "blocks.0.attn.q_norm.weight", "module.x", "encoder.blocks.0.w"):
        source = make.safetensors(f"unknown {key}", under("m", {**sit, key: np.ones(3, "f4")}))
        make.bad(f"unknown {key}", source, "not expected")
    less = {k: v for k, v in under("ema.module", sit).items() if "blocks.1.attn" not in k}
    make.bad("a layer is missing", make.safetensors("less", less), r"blocks\.1\.attn.*missing")
    make.bad("other model", make.safetensors("bert", {"bert.w": np.ones(3)}), "is none of SiT")


def _objects(make: Maker) -> None:
    made = {
        "os.system": call("os", "system", "touch stolen"),
        "datetime": call("datetime", "datetime", "\x07\xea"),
        "a NumPy scalar": call("numpy._core.multiarray", "scalar", 1, "x"),
        "a path": call("pathlib", "PosixPath", "/", "data"),
        "a set": Op(b"\x8f(" + op(1) + b"\x90"),
        "an enum as a key": Op(b"}" + call("train", "Mode", 1) + op(1) + b"s"),
        "a whole module": built("models", "SiT", {"w": [1]}),
    }
    for title, value in made.items():
        make.good(f"{title} beside", make.pickled(f"{title} beside", {"x": value}))
        space = built("argparse", "Namespace", {"seed": 0, "x": value, "path_type": "GVP"})
        source = make.pickled(f"{title} in the arguments", {"args": space})
        make.good(f"{title} in the arguments", source, says="gvp path, velocity")
    config = built("omegaconf.dictconfig", "DictConfig", {"_content": {"path_type": "GVP"}})
    source = make.pickled("omegaconf", {"args": config})
    make.good("arguments of OmegaConf", source, says="taken as a linear path, velocity")
    source = make.pickled("an ema object", {"ema": built("torch_ema", "EMA", {"w": 1})})
    make.good("an EMA object beside", source, says="left out: ema: made by torch_ema.EMA")
    make.bad("an EMA object asked for", source, "ema is made by torch_ema.EMA", "--weights=ema")
    make.bad("an EMA object by entry", source, "ema is made by torch_ema.EMA", "--entry=ema")
    for title, root in (
        ("a whole module as root", lambda tree: built("models", "SiT", {"_modules": tree})),
        ("os.system as root", lambda tree: call("os", "system", "touch stolen")),
    ):
        make.bad(title, make.pickled(title, {"__root__": root}), "the file is made by .*nothing")
    array = call("numpy._core.multiarray", "_reconstruct", name("numpy", "ndarray"), (0,))
    root = lambda tree: {"ema": {**tree, QKV: array}}
    source = make.pickled("weights of NumPy", {"__root__": root})
    make.bad("weights of NumPy", source, rf"ema\.{QKV} is made by numpy")


def _tensors(make: Maker) -> None:
    hooks = call("collections", "OrderedDict")
    layout = call("torch.serialization", "_get_layout", "torch.sparse_coo")
    view = (storage("FloatStorage", "0", 1), 0, (1,), (1,), False, hooks)
    shown = {
        "sparse": call("torch._utils", "_rebuild_sparse_tensor", layout, ()),
        "quantized": call("torch._utils", "_rebuild_qtensor", 1),
        "without data": call("torch._utils", "_rebuild_meta_tensor_no_storage", 1),
        "conjugate": call("torch._utils", "_rebuild_tensor_v2", *view, {"conj": True}),
        "torch.complex32": call(
            "torch._utils", "_rebuild_tensor_v3", *view, name("torch", "complex32")
        ),
        "torch.NewStorage": tensor(store=storage("NewStorage")),
    }
    first = {"first": np.zeros(1, "f4")}  # is storage 0
    for what, value in shown.items():
        for title, needed in ((f"{what} beside", False), (f"{what} needed", True)):

            def root(tree, value=value, needed=needed):
                left = tree.pop("first")
                return {"model": {**tree, QKV: value} if needed else tree, "x": [left, value]}

            source = make.pickled(title, {"__root__": root}, first | make.sit)
            if needed:
                make.bad(title, source, rf"model\.{QKV} is a tensor.*{what}|is a .*{what}.*tensor")
            else:
                make.good(title, source)
    complex_state = {**make.sit, QKV: make.sit[QKV].astype("c8")}
    source = make.safetensors("complex", complex_state)
    make.bad("complex needed", source, "dtype complex64, expected a floating-point one")
    source = make.safetensors("complex beside", {**under("m", make.sit), "y": np.ones(2, "c8")})
    make.good("complex beside", source, says="left out: y")


def _float8(make: Maker) -> None:
    for dtype in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        kind = np.dtype(getattr(ml_dtypes, dtype))
        small = {k: v if k.startswith("pos") else v.astype(kind) for k, v in make.sit.items()}
        make.keep(dtype, {k: v.astype("f4") for k, v in small.items()}, "--heads=2")
        says = "tensors of float8 are kept as float32"
        source = make.safetensors(dtype, {k: v for k, v in small.items()})
        make.good(f"{dtype} in safetensors", source, same=dtype, says=says)
        source = make.pickled(dtype, {}, small)
        make.good(f"{dtype} in torch", source, same=dtype, says=says)
    for suffix in ("scale_weight", "weight_scale", "weight_scale_inv"):
        scaled = {**small, QKV.replace("weight", suffix): np.ones(1, "f4")}
        source = make.safetensors(f"float8 {suffix}", under("model", scaled))
        make.bad(f"float8 with {suffix}", source, "scaled float8 is not supported")
    for dtype in (np.float16, ml_dtypes.bfloat16):
        state = {k: v if k.startswith("pos") else v.astype(dtype) for k, v in make.sit.items()}
        key = np.dtype(dtype).name
        make.keep(key, state, "--heads=2")
        make.good(f"{key} in torch", make.torch(key, {"ema": under("module", state)}), same=key)


def _shards(make: Maker) -> None:
    names = list(make.sit)
    for ending, title in ((".safetensors", "model"), (".bin", "pytorch_model")):
        folder = make.root / f"shards{ending}"
        make_index(folder, title, ending, make.sit, names[::3])
        index = folder / f"{title}{ending}.index.json"
        make.good(f"index of {ending}", index)
        make.good(f"folder with an index of {ending}", folder)
    folder = make.root / "single"
    folder.mkdir()
    save_file(under("module", make.sit), folder / "diffusion.safetensors")
    make.good("folder with one file", folder)
    save_file(make.other, folder.parent / "single" / "x.safetensors")
    make.bad("folder with two files", folder, "several files of weights: give one of diffusion")
    make.cases[-2] = replace(
        make.cases[-2],
        args=(f"--source={folder / 'diffusion.safetensors'}", *make.cases[-2].args[1:]),
    )

    def broken(title: str, change: Callable[[Path, dict], None], says: str) -> None:
        folder = make.root / title.replace(" ", "_")
        index = make_index(folder, "model", ".safetensors", make.sit, names[::3])
        content = json.loads(index.read_text())
        change(folder, content["weight_map"])
        index.write_text(json.dumps(content))
        make.bad(title, index, says)

    first, second = "model-1.safetensors", "model-2.safetensors"
    broken("shard missing", lambda f, m: (f / second).unlink(), rf"missing, the first is {second}")
    broken("absent tensor", lambda f, m: m.update(x=first), f"x is not in {first}")
    broken("tensor of another shard", lambda f, m: m.update({names[1]: second}), "is not in")
    broken("tensor not in the index", lambda f, m: m.pop(names[0]), "but not in the index")
    broken("path outside", lambda f, m: m.update(x="../x.safetensors"), "expected a file beside it")
    broken("empty index", lambda f, m: m.clear(), "expected a weight_map")
    broken(
        "tensor in two shards",
        lambda f, m: save_file(make.sit, f / second),
        r"is in model-\d.safetensors and in model-\d",
    )
    text = make.root / "text.safetensors.index.json"
    text.write_text("<html>")
    make.bad("index that is a page", text, "is no index of weights")
    empty = make.root / "empty"
    empty.mkdir()
    make.bad("empty folder", empty, "a folder without a file of weights")


def _autoencoders(make: Maker) -> None:
    state = vae_state()
    make.keep("vae", state, "--dtype=float32")
    for naming in ("diffusers", "legacy", "compvis"):
        names = autoencoder_state("vae", Autoencoder(VAE).init(0), naming)
        names = {k: np.asarray(v) for k, v in names.items()}
        title = f"first_stage_model in the names of {naming}"
        tree = {"state_dict": under("first_stage_model", names)}
        make.good(title, make.torch(title, tree), "--kind=vae", same="vae")
    ldm = {**under("model.diffusion_model", make.sit), **under("first_stage_model", state)}
    source = make.safetensors("vae of both", ldm)
    make.good("VAE of SiT and VAE", source, "--kind=vae", same="vae", says="left out: model ")
    sd3 = {k: v for k, v in state.items() if "quant_conv" not in k}
    for title, flags in (("no quant_conv", ()), ("no quant_conv, --kind", ("--kind=vae",))):
        source = make.safetensors(title, under("vae", sd3))
        make.bad(
            title, source, "an AutoencoderKL without quant_conv is of the SD3/FLUX kind", *flags
        )
    tiny = {
        k: np.asarray(v)
        for k, v in autoencoder_state("taesd", Autoencoder(TAESDConfig(width=8)).init(0)).items()
    }
    make.keep("taesd", tiny, "--dtype=float32")
    source = make.torch("tiny", {"model": under("module._orig_mod", tiny)})
    make.good("TAESD, wrapped", source, "--kind=taesd", same="taesd")
    pyramid = model_state(replace(MODEL, pyramid=PPFLOW2))
    make.keep("ppflow", pyramid, "--heads=2")
    source = make.torch(
        "ppflow",
        {
            "model": make.sit,
            "ema": inside(FSDP, under("module", pyramid), r"^(module\.blocks\.\d+)"),
        },
    )
    make.good("PPFlow's EMA, wrapped by FSDP", source, same="ppflow")
