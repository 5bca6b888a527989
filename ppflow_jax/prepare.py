"""Encode a dataset once: python -m ppflow_jax.prepare --source=folder --path=DIR --vae=vae:DIR
--out=CACHE, then train with --config.data.source=cache --config.data.path=CACHE.

    python -m ppflow_jax.prepare --path=DIR --out=CACHE --fields=teacher=weights/inception
    python -m ppflow_jax.prepare --source=digits --out=DIR --fields=teacher=NETWORK

The second adds features of a teacher to a cache, the third to digits or arrays, as arrays in DIR.
The same command continues where it stopped; `--out=CACHE --verify` checks a finished cache.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from ppflow_jax import cli
from ppflow_jax.errors import InputError
from ppflow_jax.files.place import place

if TYPE_CHECKING:
    from ppflow_jax.autoencoders.encode import Encoder
    from ppflow_jax.data.cache import Manifest
    from ppflow_jax.data.pictures import Pictures

_OUT = flags.DEFINE_string("out", None, "Folder of the latent cache; made if needed.")
_SOURCE = flags.DEFINE_enum(
    "source", "folder", ["folder", "parquet", "tfds", "digits", "arrays"], "Kind of dataset."
)
_PATH = flags.DEFINE_string("path", "", "Its folder, hf:OWNER/REPO, or the name of a TFDS dataset.")
_SPLIT = flags.DEFINE_string("split", "train", "Split, of tfds and parquet.")
_IMAGE = flags.DEFINE_string("image_feature", "image", "Feature of tfds, column of parquet.")
_LABEL = flags.DEFINE_string("label_feature", "label", "Feature of tfds, column of parquet.")
_VAE = flags.DEFINE_string("vae", "", "vae:DIR or taesd:DIR, a converted autoencoder.")
_SIZE = flags.DEFINE_integer("size", 256, "Side of the pictures after ADM's centre crop, pixels.")
_FLIPS = flags.DEFINE_enum("flips", "both", ["both", "one"], "Also encode the mirror images?")
_UNREADABLE = flags.DEFINE_enum(
    "unreadable", "error", ["error", "skip"], "Pictures that cannot be read; skip lists them."
)
_BATCH = flags.DEFINE_integer("batch", 16, "Pictures encoded at once on each device.")
_SHARD = flags.DEFINE_integer("shard_pictures", 8192, "Pictures per file.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes that decode pictures; 0: threads.")
_FIELDS = flags.DEFINE_list(
    "fields", [], "NAME=FOLDER of a feature network, whose features by place become the field NAME."
)
_RESIZE = flags.DEFINE_enum(
    "resize", "tf1", ["tf1", "torch"], "To 299x299 for an Inception of --fields."
)
_VERIFY = flags.DEFINE_bool("verify", False, "Only compare the files of --out with its manifest.")


def main() -> None:
    import jax

    from ppflow_jax.autoencoders.encode import Encoder
    from ppflow_jax.data.classes import describe
    from ppflow_jax.data.sources import ArraySource, open_source
    from ppflow_jax.devices import processes
    from ppflow_jax.files.disk import writable_directory
    from ppflow_jax.generate.fields import array_field, cache_field, networks

    processes.initialize()
    if _VERIFY.value:
        verify(place(_OUT.value))
        return
    arrays = _SOURCE.value in ("digits", "arrays")
    if arrays and (_VAE.value or not _FIELDS.value):
        raise InputError(f"--source={_SOURCE.value} takes --fields, and no --vae")
    if not arrays and (not _PATH.value or not (_VAE.value or _FIELDS.value)):
        raise InputError("--path and --vae are required (or --verify, to check a cache)")
    if min(_SIZE.value, _BATCH.value, _SHARD.value) < 1 or _WORKERS.value < 0:
        raise InputError("--size, --batch and --shard_pictures must be at least 1, --workers 0")
    encoder = Encoder.parse(_VAE.value, "--vae") if _VAE.value else None
    teachers = networks(_FIELDS.value, _RESIZE.value)
    source = open_source(
        _SOURCE.value,
        _PATH.value,
        size=_SIZE.value if encoder or arrays else cached(place(_OUT.value)).size,
        split=_SPLIT.value,
        image=_IMAGE.value,
        label=_LABEL.value,
    )
    if jax.process_index() == 0:
        for line in describe(source):
            print(line, flush=True)
    out = writable_directory(_OUT.value)
    if encoder:
        encode(source, encoder, out)
    for name, network in teachers.items():
        if isinstance(source, ArraySource):
            array_field(source, out, name, network, batch=_BATCH.value)
        else:
            given = dict(batch=_BATCH.value, workers=_WORKERS.value)
            cache_field(out, source, name, network, **given)


def cached(folder: Path) -> Manifest:
    from ppflow_jax.data.cache import Manifest

    return Manifest.read(folder)


def encode(source: Pictures, encoder: Encoder, out: Path) -> None:
    """Make the latent cache, or what is missing of it."""
    import jax

    from ppflow_jax.console import say
    from ppflow_jax.files.disk import locked
    from ppflow_jax.generate.encoding import Job, Latents
    from ppflow_jax.generate.latent_cache import finish, prepare_shards

    encoder.latent_shape(_SIZE.value)
    job = Job(
        source,
        Latents(encoder, _SIZE.value),
        out=out,
        flips=_FLIPS.value,
        batch=_BATCH.value,
        shard_pictures=_SHARD.value,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with locked(job.out) if jax.process_index() == 0 else contextlib.nullcontext():
        prepare_shards(job, skip_unreadable=_UNREADABLE.value == "skip", workers=_WORKERS.value)
        manifest = finish(job)
    if manifest is None:
        return
    for name in manifest.unreadable:
        say(f"left out, cannot be read: {name}")
    print(
        f"{manifest.pictures} pictures ({manifest.records} records) of {len(source)}, "
        f"{len(manifest.unreadable)} unreadable, in {job.out}"
    )


def verify(folder: Path) -> None:
    """Compare every shard with its manifest, also of fields: size, SHA-256, number of records.

    Raises:
      InputError: no manifest, or the first shard that differs.
    """
    from ppflow_jax.data.fields import FieldManifest, folder_of

    found = {folder: cached(folder)}
    found |= {f: FieldManifest.read(f) for f in sorted(folder_of(folder, "").glob("*"))}
    for where, manifest in found.items():
        manifest.check_files(where, checksums=True)
        print(f"{where}: {len(manifest.shards)} shards, {manifest.records} records, as written")


if __name__ == "__main__":
    cli.run(main, required=("out",))
