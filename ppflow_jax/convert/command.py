"""The work of the command `convert`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from absl import flags

from ppflow_jax.autoencoders.decode import save_autoencoder
from ppflow_jax.checkpoints.card import read_card
from ppflow_jax.checkpoints.weights import save_weights, stored_weights
from ppflow_jax.console import progress
from ppflow_jax.convert.autoencoder_keys import autoencoder_config, autoencoder_params, dropped_keys
from ppflow_jax.convert.export import export
from ppflow_jax.convert.inception_keys import dropped, inception_params
from ppflow_jax.convert.infer import find_kind
from ppflow_jax.convert.known import ADD_ONS, BOOKKEEPING
from ppflow_jax.convert.load import DTYPES, EXACT
from ppflow_jax.convert.names import Wanted
from ppflow_jax.convert.posthoc import make_average
from ppflow_jax.convert.reading import Reading, read_model
from ppflow_jax.convert.shards import find_weights, on_disk
from ppflow_jax.convert.source import Source, open_source
from ppflow_jax.errors import InputError
from ppflow_jax.files.hub import fetched, is_hub
from ppflow_jax.files.place import place
from ppflow_jax.files.store import check_new, find_checkpoint
from ppflow_jax.metrics.networks import save_inception
from ppflow_jax.models.adapters import merge, plain, text
from ppflow_jax.models.parts import DIT
from ppflow_jax.systems.expand import expand, expanded_config

FLAGS = flags.FLAGS


def convert() -> None:
    """What the flags of the command say, see `__main__`."""
    target = check_new(FLAGS.target)
    if FLAGS.posthoc_ema is not None:
        if FLAGS.to != "orbax" or FLAGS.pyramid or FLAGS.merge or len(FLAGS.source) > 1:
            raise InputError(
                "--posthoc_ema takes one run as --source, without --to, --pyramid and --merge: "
                "give these in a second command"
            )
        make_average(FLAGS.source[0], target, FLAGS.posthoc_ema)
        return
    if FLAGS.to != "orbax":
        if len(FLAGS.source) > 1:
            raise InputError(f"--to={FLAGS.to} takes one checkpoint folder as --source")
        export(FLAGS.source[0], target, FLAGS.to, FLAGS.weights)
        return
    paths = [_weights_path(source) for source in FLAGS.source]
    if None in paths or FLAGS.merge:
        if (bool(FLAGS.pyramid) == FLAGS.merge) or len(paths) > 1 or None not in paths:
            source = ",".join(FLAGS.source) + (" is a folder" if None in paths else "")
            raise InputError(
                f"--source={source}: give a file of weights; or one checkpoint "
                "folder with --pyramid=ppflow2 to expand a one-stage model, with --merge to fold "
                "adapters and base into plain weights, or with --to=torch to make a file of it"
            )
        (merge_checkpoint if FLAGS.merge else expand_checkpoint)(FLAGS.source[0], target)
        return
    sources = [open_source(path, _wanted()) for path in paths]
    try:
        kinds = {FLAGS.kind or find_kind(source.state) for source in sources}
        if kinds <= {"sit", "ppflow"} and len(sources) == 1:
            import_model(sources[0], *kinds, target)
        elif kinds == {"inception"} and len(sources) == 1:
            import_inception(sources[0], target)
        elif len(kinds) == 1 and (kinds == {"taesd"} or len(sources) == 1):
            import_autoencoder(sources, *kinds, target)
        else:
            raise InputError("only the encoder and the decoder of a TAESD may be given together")
    except InputError as error:
        raise InputError(f"{','.join(FLAGS.source)}: {error}") from error


def _weights_path(source: str) -> str | None:
    """The file or index of weights; None for a folder without one, such as a checkpoint."""
    path = fetched(source) if is_hub(source) else place(source)
    if not path.is_dir():
        return str(on_disk(path))
    found = find_weights(path)
    return str(on_disk(found)) if found else None


def _wanted() -> Wanted:
    kind = "sit" if FLAGS.kind == "ppflow" else FLAGS.kind
    weights = "model" if FLAGS.weights == "params" else FLAGS.weights
    return Wanted(kind, weights, FLAGS.entry, FLAGS.prefix)


def import_model(source: Source, kind: str, target: Path) -> None:
    """SiT, PPFlow or DiCo file -> checkpoint.

    Raises:
      InputError: see `find_config`, `load_state`, `expand`.
    """
    reading = Reading(
        pyramid=FLAGS.pyramid,
        seed=FLAGS.seed,
        heads=FLAGS.heads,
        latent_size=FLAGS.latent_size,
        ffn=FLAGS.ffn,
        mixer=FLAGS.mixer,
        network=FLAGS.network,
        path=FLAGS.path,
        prediction=FLAGS.prediction,
        space=FLAGS.space,
        dtype=FLAGS.dtype,
    )
    with progress(len(source.state), 0, "tensor", "convert") as bar:
        loaded = read_model(source, kind, reading, bar.update)
        bar.set_postfix_str("writing")
        save_weights(target, loaded.card, loaded.params, loaded.positions)
    config, flow, params = loaded.card.model, loaded.card.flow, loaded.params
    if loaded.drift > EXACT:
        print(
            f"positions of the file differ from the sin-cos values by up to {loaded.drift:.1e}, as "
            "rounding in a trainer's EMA makes them: the exact ones are used"
        )
    _report(source, kind, params, target)
    if ADD_ONS & {name.split(".")[-1] for name in source.left_out}:
        print(
            "REPA and SRA train SiT with time running from data to noise, the other way round: the "
            "weights are a start for training here, and samples of them are noise"
        )
    said = source.argument("path_type"), source.argument("prediction")
    if source.arguments and not all(
        a or b for a, b in zip(said, (reading.path, reading.prediction))
    ):
        print(f"not said by the file's arguments: taken as a {flow.path} path, {flow.prediction}")
    print(
        f"stages {config.pyramid}; latent {'x'.join(map(str, config.shape))}, {config.num_classes} "
        f"classes, width {config.width}, depth {config.depth}, heads {config.heads}; "
        f"{flow.path} path, {flow.prediction}"
        + (f", times shifted by {flow.shift:.4g}" if flow.shift != 1 else "")
    )
    if config.network is not None:
        print(f"network {config.network}: what names do not say is as --network says")
    if config.block != DIT:
        print(f"blocks with {config.block}: what names do not say is as --ffn and --mixer say")


def expand_checkpoint(source: str, target: Path) -> None:
    """One-stage checkpoint -> checkpoint of a pyramid.

    Raises:
      InputError: see `expand`, `load_stored`.
    """
    folder = find_checkpoint(source)
    card, pyramid = read_card(folder), Reading(pyramid=FLAGS.pyramid).stages
    expanded_config(card.model, pyramid)  # before anything is read
    config, params = expand(
        card.model, stored_weights(folder, card, FLAGS.weights), pyramid, FLAGS.seed
    )
    save_weights(target, replace(card, model=config, experiment=None), params)
    print(f"stages {config.pyramid}, from {folder}, in {target}")


def merge_checkpoint(source: str, target: Path) -> None:
    """Checkpoint with adapters, or with a base -> checkpoint with all weights and no adapters.

    Raises:
      InputError: see `stored_weights`; nothing to merge.
    """
    folder = find_checkpoint(source)
    card = read_card(folder)
    if not card.model.adapters and card.base is None:
        raise InputError(f"{folder} has neither adapters nor a base: it needs no --merge")
    params = merge(card.model, stored_weights(folder, card, FLAGS.weights))
    model = plain(card.model)
    save_weights(target, replace(card, model=model, experiment=None, base=None), params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{count:,} parameters, adapters {text(card.model.adapters)} merged, in {target}")


def import_autoencoder(sources: list[Source], kind: str, target: Path) -> None:
    """AutoencoderKL or TAESD file(s) -> folder for `sample --decode`.

    Raises:
      InputError: see `autoencoder_params`; dtypes that float32 parameters cannot keep.
    """
    dtype = _one_dtype(sources, kind)
    params, config = {}, None
    with progress(sum(len(source.state) for source in sources), 0, "tensor", "convert") as bar:
        for source in sources:
            state = _read(source, bar)
            config = autoencoder_config(kind, state, _vae_config(source.path, kind))
            part = autoencoder_params(kind, state, config)
            if again := params.keys() & part.keys():
                raise InputError(f"the {' and '.join(again)} is in both files")
            params |= part
        save_autoencoder(target, kind, config, params, dtype)
    left_out = Counter(
        name.split(".")[0] for source in sources for name in dropped_keys(source.state)
    )
    for source in sources:
        left_out.update(source.left_out)
    _report(replace(sources[0], left_out=left_out), kind, params, target)
    print(f"{', '.join(params)}; {config}")


def import_inception(source: Source, target: Path) -> None:
    """FID Inception file -> folder for the metrics.

    Raises:
      InputError: see `inception_params`; dtypes that float32 parameters cannot keep.
    """
    dtype = _one_dtype([source], "inception")
    left_out = Counter(filter(None, map(dropped, source.state)))
    with progress(len(source.state), 0, "tensor", "convert") as bar:
        config, params = inception_params(_read(source, bar))
        save_inception(target, config, params, dtype)
    _report(replace(source, left_out={**source.left_out, **left_out}), "inception", params, target)
    layer = "with" if config.logits else "without"
    print(f"{layer} the last layer, which only the Inception Score needs")


def _one_dtype(sources: list[Source], kind: str) -> str:
    """The dtype of networks that are kept in float32: of all tensors, or as --dtype says."""
    if FLAGS.pyramid:
        raise InputError(f"--pyramid={FLAGS.pyramid} is for SiT models, the file is a {kind}")
    refs = [ref for source in sources for ref in source.state.values()]
    dtypes = sorted({str(np.dtype(ref.dtype)) for ref in refs if ref.dtype in DTYPES})
    if not FLAGS.dtype and (len(dtypes) > 1 or "float64" in dtypes):
        raise InputError(
            f"has tensors of {' and '.join(dtypes)}: give --dtype=float32 to convert them all"
        )
    return FLAGS.dtype or next(iter(dtypes), "float32")


def _read(source: Source, bar) -> dict[str, np.ndarray]:
    state = {}
    for name, ref in source.state.items():
        state[name] = ref.read()
        bar.update()
    return state


def _vae_config(path: str, kind: str) -> dict | None:
    """The config.json that the user gives, or an AutoencoderKL's beside the file."""
    given = FLAGS.vae_config
    file = place(given) if given else Path(path).with_name("config.json")
    if kind != "vae" or not (given or file.is_file()):
        return None
    try:
        values = json.loads(file.read_text())
        named = values.get("_class_name") == "AutoencoderKL"
    except (ValueError, AttributeError, OSError) as error:
        if not given:
            return None
        raise InputError(f"cannot read --vae_config={given}: {error}") from error
    if not given and not named:
        return None
    print(f"architecture from {file}")
    return values


def _report(source: Source, kind: str, params, target: Path) -> None:
    """Says what was made of what, and what was renamed, widened and left out."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    left_out = ", ".join(_counted(*item) for item in source.left_out.items())
    print(
        f"{kind}{f' from {source.entry!r}' if source.entry else ''}: {count:,} parameters in "
        f"{target}{f'; left out: {left_out}' if left_out else ''}"
    )
    if source.removed:
        print(f"removed from names: {', '.join(source.removed)}")
    if source.widened:
        print(f"{source.widened} tensors of float8 are kept as float32, which holds them exactly")


def _counted(name: str, count: int) -> str:
    if count == 0 or (count == 1 and name.split(".")[-1] in BOOKKEEPING):
        return name
    return f"{name} ({count} tensor{'s' if count > 1 else ''})"
