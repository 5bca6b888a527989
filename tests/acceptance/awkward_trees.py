"""Sixty awkward image trees: what `prepare`, `evaluate` and `main` must make of each."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from ppflow_jax.autoencoders.autoencoder import Autoencoder
from ppflow_jax.autoencoders.decode import save_autoencoder
from ppflow_jax.autoencoders.taesd import TAESDConfig
from ppflow_jax.metrics.networks import save_small
from ppflow_jax.metrics.small_network import FeatureNet, FeatureNetConfig
from tests import commands
from tests.acceptance.case import Case
from tests.pictures import pixels

SIZE = 16
Files = dict[str, bytes | str]


def png(seed: int = 0, height: int = 20, width: int = 24) -> bytes:
    return saved(Image.fromarray(pixels(seed, height, width)), "png")


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def header_only(width: int, height: int) -> bytes:
    """A PNG of these sides whose pixels compress to almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    pixels = zlib.compress(bytes(min(height * (1 + width), 1 << 20)))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def grey(dtype: str, kind: str, high: float) -> bytes:
    ramp = np.linspace(0, high, 400).reshape(20, 20).astype(dtype)
    return saved(Image.fromarray(ramp), kind)


def twelve_bit() -> bytes:
    return grey("uint16", "tiff", 4095)


def two_classes() -> Files:
    return {f"{c}/{i}.png": png(10 * k + i) for k, c in enumerate(("cat", "dog")) for i in (0, 1)}


def packed(labels: object, **others: object) -> Files:
    files: Files = {f"0000{k // 2}/img0000000{k}.png": png(k) for k in range(4)}
    return files | {"dataset.json": json.dumps({"labels": labels} | others)}


PAIRS = [[f"0000{k // 2}/img0000000{k}.png", label] for k, label in enumerate((3, 0, 3, 1))]


def frames(kind: str) -> bytes:
    first, second = (Image.fromarray(pixels(k, 20, 24)) for k in (1, 2))
    return saved(first, kind, save_all=True, append_images=[second])


# name: (files, links {path: target}, exit code, what is said, labels by class name or number)
TREES: dict[str, tuple] = {
    "plain": (two_classes(), {}, 0, "0 cat .2., 1 dog .2.", {"cat": 2, "dog": 2}),
    "checkpoints of notebooks": (
        two_classes() | {".ipynb_checkpoints/a.png": png(), "cat/.ipynb_checkpoints/0.png": png()},
        {}, 0, "left out 2 hidden", {"cat": 2, "dog": 2},
    ),
    "trash": (two_classes() | {".Trash-0/files/a.png": png()}, {}, 0, "hidden", {"cat": 2, "dog": 2}),
    "resource forks": (
        two_classes() | {"cat/._0.png": b"\0\5", "dog/._1.png": b"\0\5"},
        {}, 0, "left out 2 hidden", {"cat": 2, "dog": 2},
    ),
    "__MACOSX": (two_classes() | {"__MACOSX/cat/0.png": png()}, {}, 0, "1 hidden", {"cat": 2, "dog": 2}),
    "@eaDir": (two_classes() | {"cat/@eaDir/0.png": png()}, {}, 0, "1 hidden", {"cat": 2, "dog": 2}),
    "git": (two_classes() | {".git/x.png": png(), ".DS_Store": b"x"}, {}, 0, "2 hidden", {"cat": 2, "dog": 2}),
    "one level too high": (
        {f"{s}/{k}": v for s in ("train", "val") for k, v in two_classes().items()},
        {}, 1, "look like splits.*give the folder.*/train", None,
    ),
    "only train": ({f"train/{k}": v for k, v in two_classes().items()}, {}, 1, "/train", None),
    "flat splits": ({"train/a.png": png(), "test/b.png": png()}, {}, 1, "look like splits", None),
    "Training and Validation": ({"Training/a.png": png(), "Validation/b.png": png()}, {}, 1, "look like splits", None),
    "train2017": ({"train2017/a.png": png(), "val2017/b.png": png()}, {}, 1, "look like splits", None),
    "split beside classes": (
        two_classes() | {"val/cat/a.png": png()}, {}, 1, "val, which look like splits", None,
    ),
    "folders of classes": ({"animals/cat/a.png": png(), "cars/bus/a.png": png()}, {}, 1, "folders of classes", None),
    "a class called train": (two_classes() | {"train/a.png": png()}, {}, 0, "2 train .1.", {"cat": 2, "dog": 2, "train": 1}),
    "deeper pictures in one class": (two_classes() | {"cat/more/x.png": png()}, {}, 0, "", {"cat": 3, "dog": 2}),
    "packed with labels": (packed(PAIRS), {}, 0, "", {0: 1, 1: 1, 3: 2}),
    "packed, backslashes": (packed([[n.replace("/", "\\"), y] for n, y in PAIRS]), {}, 0, "", {0: 1, 1: 1, 3: 2}),
    "packed, labels null": (packed(None), {}, 1, "has no labels", None),
    "packed, labels empty": (packed([]), {}, 1, "has no labels", None),
    "packed, one-hot labels": (packed([[n, [0, 1]] for n, _ in PAIRS]), {}, 1, "whole number", None),
    "packed, negative label": (packed([[n, -1] for n, _ in PAIRS]), {}, 1, "whole number", None),
    "packed, float label": (packed([[n, 1.5] for n, _ in PAIRS]), {}, 1, "whole number", None),
    "packed, absent file": (packed([*PAIRS, ["00009/img00000009.png", 1]]), {}, 1, "names 00009/img00000009.png", None),
    "packed, file twice": (packed([*PAIRS, PAIRS[0]]), {}, 1, "names a file twice", None),
    "packed, unlisted picture": (packed(PAIRS[:3]), {}, 0, "1 pictures without a label", {0: 1, 3: 2}),
    "packed, not JSON": (packed(None) | {"dataset.json": "{"}, {}, 1, "dataset.json cannot be read", None),
    "packed, other JSON": (packed(None) | {"dataset.json": "[1]"}, {}, 1, "dataset.json cannot be read", None),
    "packed without dataset.json": ({n: png() for n, _ in PAIRS}, {}, 1, "packed by the EDM or StyleGAN tool", None),
    "packed, one level too high": ({f"data/{k}": v for k, v in packed(PAIRS).items()}, {}, 1, "give .*/data", None),
    "link back up": (two_classes(), {"cat/up": "..", "dog/self": "."}, 0, "2 links", {"cat": 2, "dog": 2}),
    "link above the root": (two_classes(), {"cat/far": "../.."}, 0, "1 links", {"cat": 2, "dog": 2}),
    "link to another class": (two_classes(), {"a_first/link": "../dog"}, 1, "a_first has no pictures", None),
    "link into a class": (two_classes(), {"cat/more": "../dog"}, 0, "1 links", {"cat": 2, "dog": 2}),
    "class that is a link": (two_classes(), {"emu": "../outside"}, 0, "2 emu .1.", {"cat": 2, "dog": 2, "emu": 1}),
    "two classes, one target": (two_classes(), {"emu": "../outside", "fox": "../outside"}, 0, "1 links", {"cat": 2, "dog": 2, "emu": 1}),
    "pictures that are links": (two_classes(), {"cat/9.png": "0.png"}, 0, "", {"cat": 3, "dog": 2}),
    "link to nowhere": (two_classes(), {"cat/9.png": "gone.png"}, 1, "cannot read cat/9.png", None),
    "link to itself": (two_classes(), {"cat/9.png": "9.png"}, 1, "cannot read cat/9.png", None),
    "all extensions": (
        {
            "cat/a.jfif": saved(Image.fromarray(pixels(1)), "jpeg"),
            "cat/b.JPE": saved(Image.fromarray(pixels(2)), "jpeg"),
            "cat/c.tif": saved(Image.fromarray(pixels(3)), "tiff"),
            "cat/d.gif": saved(Image.fromarray(pixels(4)), "gif"),
            "dog/e.WEBP": saved(Image.fromarray(pixels(5)), "webp"),
            "dog/f.bmp": saved(Image.fromarray(pixels(6)), "bmp"),
            "dog/g.pgm": saved(Image.fromarray(pixels(7)).convert("L"), "ppm"),
        },
        {}, 0, "", {"cat": 4, "dog": 3},
    ),
    "other files": (two_classes() | {"cat/a.txt": "x", "dog/b.npy": b"x", "LICENSE": "x"}, {}, 0, "1 .npy files, 1 .txt files, 1 files without extension", {"cat": 2, "dog": 2}),
    "loose pictures": (two_classes() | {"grid.png": png()}, {}, 0, "1 pictures outside", {"cat": 2, "dog": 2}),
    "empty class": (two_classes() | {"eel/readme.txt": "x"}, {}, 1, "eel has no pictures", None),
    "class of hidden files": (two_classes() | {"eel/.a.png": png()}, {}, 1, "eel has no pictures", None),
    "numbers as names": ({f"{c}/a.png": png(c) for c in (0, 2, 10)}, {}, 0, "directory 10 is class 1", {"0": 1, "10": 1, "2": 1}),
    "numbers with zeros": ({f"{c:02d}/a.png": png(c) for c in range(3)}, {}, 0, "0 00 .1.", {"00": 1, "01": 1, "02": 1}),
    "odd names": ({"Ünï code/a b.png": png(), "\u732b/\u732b.png": png(1)}, {}, 0, "", {"Ünï code": 1, "\u732b": 1}),
    "float TIFF": (two_classes() | {"cat/f.tif": grey("float32", "tiff", 1)}, {}, 1, "cat/f.tif .not an 8-bit", None),
    "int32 TIFF": (two_classes() | {"cat/i.tif": grey("int32", "tiff", 255)}, {}, 1, "cat/i.tif .not an 8-bit", None),
    "12-bit grey": (two_classes() | {"cat/t.tif": twelve_bit()}, {}, 1, "cat/t.tif .not an 8-bit", None),
    "16-bit grey PNG": (two_classes() | {"cat/s.png": grey("uint16", "png", 65535)}, {}, 1, "cat/s.png .not an 8-bit", None),
    "animated GIF": (two_classes() | {"cat/a.gif": frames("gif")}, {}, 1, "more than one frame", None),
    "pages of a TIFF": (two_classes() | {"cat/a.tiff": frames("tiff")}, {}, 1, "more than one frame", None),
    "animated WebP": (two_classes() | {"cat/a.webp": frames("webp")}, {}, 1, "more than one frame", None),
    "1x3000": (two_classes() | {"cat/a.png": png(0, 3000, 1)}, {}, 1, "1x3000 pixels", None),
    "30000x1": (two_classes() | {"cat/a.png": png(0, 1, 30000)}, {}, 1, "30000x1 pixels", None),
    "900 million pixels": (two_classes() | {"cat/a.png": header_only(30000, 30000)}, {}, 1, "cat/a.png .*pixels", None),
    "100 million pixels": (two_classes() | {"cat/a.png": header_only(10000, 10000)}, {}, 1, "10000x10000 pixels", None),
    "text called PNG": (two_classes() | {"cat/a.png": "<html>"}, {}, 1, "no picture of a known format", None),
    "empty PNG": (two_classes() | {"cat/a.png": b""}, {}, 1, "cat/a.png", None),
}  # fmt: skip
ZIPS: dict[str, tuple] = {
    "zip of classes": (two_classes(), 0, "", {"cat": 2, "dog": 2}),
    "zip of a folder": ({f"data/{k}": v for k, v in two_classes().items()}, 0, "", {"cat": 2, "dog": 2}),
    "zip with __MACOSX": (two_classes() | {"__MACOSX/cat/._0.png": b"x"}, 0, "1 hidden", {"cat": 2, "dog": 2}),
    "packed zip": (packed(PAIRS), 0, "", {0: 1, 1: 1, 3: 2}),
    "packed zip, no labels": (packed(None), 1, "has no labels", None),
}  # fmt: skip


def cases(root: Path) -> list[Case]:
    autoencoder = Autoencoder(TAESDConfig(width=4))
    params = jax.tree.map(np.asarray, autoencoder.init(0))
    save_autoencoder(root / "taesd", "taesd", autoencoder.config, params, "float32")
    made = []
    for k, (name, (files, links, code, says, labels)) in enumerate(TREES.items()):
        folder = make_tree(root / f"tree{k:02d}", files, links)
        made.append(prepared(name, folder, root, code, says, labels))
    for k, (name, (files, code, says, labels)) in enumerate(ZIPS.items()):
        path = make_zip(root / f"tree{k}.zip", files)
        made.append(prepared(name, path, root, code, says, labels))
    return made + evaluated(root) + trained(root)


def make_tree(root: Path, files: Files, links: dict[str, str]) -> Path:
    """ROOT/data with these files and links, beside ROOT/outside."""
    write(root / "data", files)
    write(root / "outside", {"x.png": png(99)})
    for path, target in links.items():
        (root / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "data" / path).symlink_to(target)
    return root / "data"


def make_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
    return path


def write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def prepared(name: str, path: Path, root: Path, code: int, says: str, labels: dict | None) -> Case:
    """`prepare` must find these labels, or refuse and leave no cache."""
    out = root / "caches" / name.replace(" ", "_")

    def check() -> str | None:
        manifest = out / "manifest.json"
        if labels is None:
            return "a manifest was written" if manifest.exists() else None
        found = json.loads(manifest.read_text())["labels"]
        names = found["names"]
        counts = {names[int(k)] if names else int(k): n for k, n in found["counts"].items()}
        return None if counts == labels else f"labels {counts}, expected {labels}"

    flags = (f"--path={path}", f"--vae=taesd:{root}/taesd", f"--out={out}", f"--size={SIZE}")
    return Case(name, "prepare", (*flags, "--batch=2"), code, says, check)


def evaluated(root: Path) -> list[Case]:
    """The same trees as sets of pictures, and folders that `sample` made."""
    network = FeatureNet(FeatureNetConfig(SIZE, 3, 2))
    params = jax.tree.map(np.asarray, network.init(0))
    save_small(root / "features", network.config, params, {"trained_on": "nothing", "accuracy": 0})
    numbers = {name: k for k, name in enumerate(TREES)}
    wanted = {
        "plain": (0, "4 images"), "checkpoints of notebooks": (0, "2 hidden"),
        "resource forks": (0, "2 hidden"), "link back up": (0, "4 images"),
        "packed with labels": (0, "4 images"), "all extensions": (0, "7 images"),
        "float TIFF": (1, "f.tif .not an 8-bit"), "16-bit grey PNG": (1, "not an 8-bit"),
        "12-bit grey": (1, "not an 8-bit"), "1x3000": (1, "1x3000"),
        "900 million pixels": (1, "pixels"), "animated GIF": (1, "more than one frame"),
    }  # fmt: skip
    made = [
        statistics(
            f"evaluate: {name}", root / f"tree{numbers[name]:02d}" / "data", root, code, says
        )
        for name, (code, says) in wanted.items()
    ]
    samples = root / "samples"
    write(samples, {f"images/{k:06d}_class0.png": png(k, SIZE, SIZE) for k in range(4)})
    write(samples, {"grid.png": png(0, 32, 32), "card.json": '{"complete": true, "settings": {}}'})
    pictures = np.stack([pixels(k, SIZE, SIZE) for k in range(4)])
    np.savez(samples / "samples.npz", arr_0=pictures)
    np.save(samples / "latents.npy", np.zeros((4, 2, 2, 4), np.float32))
    broken = root / "broken"
    write(broken, {"images/0.png": png(), "card.json": '{"complete": false, "settings": {}}'})
    made += [
        statistics("evaluate: a folder of samples", samples, root, 0, "4 images", crop=False),
        statistics("evaluate: its images", samples / "images", root, 0, "4 images"),
        statistics("evaluate: an unfinished one", broken, root, 1, "not complete", crop=False),
    ]
    above = root / "above"
    above.mkdir()
    os.symlink(samples, above / "run1")
    return [
        *made,
        statistics("evaluate: folder of folders of samples", above, root, 1, "give .*run1"),
    ]


def statistics(name: str, path: Path, root: Path, code: int, says: str, crop: bool = True) -> Case:
    out = root / "statistics" / f"{name.replace(' ', '_')}.npz"
    flags = (f"--reference={path}", f"--features={root}/features", f"--statistics_out={out}")
    check: Callable = lambda: None if out.exists() == (code == 0) else "wrong files"
    return Case(
        name, "evaluate", (*flags, *([f"--size={SIZE}"] if crop else [])), code, says, check
    )


def trained(root: Path) -> list[Case]:
    """`main` reads the same trees, as pixels."""
    numbers = {name: k for k, name in enumerate(TREES)}
    wanted = {
        "checkpoints of notebooks": (0, "2 hidden.*2 of the model's 4 classes have examples"),
        "packed with labels": (0, "3 of the model's 4 classes have examples"),
        "link back up": (0, "2 links"),
        "one level too high": (1, "look like splits"),
        "float TIFF": (1, "not an 8-bit"),
    }
    options = (*commands.SMALL, "--config.train.steps=1", "--config.data.source=folder")
    options += ("--config.model.channels=3", "--config.model.num_classes=4")
    made = []
    for name, (code, says) in wanted.items():
        path = root / f"tree{numbers[name]:02d}" / "data"
        args = (f"--config={commands.ROOT}/configs/digits.py", f"--workdir={root}/run{len(made)}")
        args += (*options, f"--config.data.path={path}")
        made.append(Case(f"main: {name}", "main", args, code, says))
    return made
