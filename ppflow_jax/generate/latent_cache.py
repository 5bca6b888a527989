"""Writing a latent cache, or a field of one, shard by shard.

While it is made, the folder has `settings.json` and, beside every finished shard, its facts as
`SHARD.json`; the manifest replaces all of them. A shard is always made from its first picture and
in the same batches.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from ppflow_jax.console import progress, say
from ppflow_jax.data.classes import Classes
from ppflow_jax.data.pipeline import explain
from ppflow_jax.data.ranged import save_index
from ppflow_jax.data.records import (
    MANIFEST,
    WRITER_OPTIONS,
    Records,
    Shard,
    label_counts,
    read_shard,
    sha256,
)
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic
from ppflow_jax.files.place import ObjectPath
from ppflow_jax.generate.encoding import Job, check_finite, encoded

SETTINGS = "settings.json"
LABEL_COUNTS = "label_counts"  # of a shard, until the manifest has them


def prepare_shards(job: Job, *, skip_unreadable: bool, workers: int) -> None:
    """Make the shards of this process that are not there yet.

    Raises:
      InputError: the folder has a cache, finished or begun, of other settings; a picture cannot
        be read (without `skip_unreadable`); its encoding is not finite.
    """
    _claim(job)
    shards = job.shards
    mine = range(job.process_index, len(shards), job.process_count)
    complete = (job.out / MANIFEST).exists()
    todo = [] if complete else shards.left(job.process_index, job.process_count)
    total, left = (sum(len(shards.records(s)) for s in some) for some in (mine, todo))
    if left < total and todo:
        say(f"continuing: {len(mine) - len(todo)} of {len(mine)} shards are there")
    stream = encoded(job, todo, workers)
    with contextlib.closing(progress(total, total - left, "img", "prepare")) as bar:
        for shard in todo:
            _write_shard(job, shard, stream, bar, skip_unreadable)


def finish(job: Job) -> Records | None:
    """When every process is done, the first one writes the manifest, and gets it."""
    _wait(job, "all shards are written")
    if job.process_index:
        return None
    if not (job.out / MANIFEST).exists():
        shards = range(len(job.shards))
        facts = [json.loads(job.facts(shard).read_text()) for shard in shards]
        labels = _classes(job, facts).to_json()
        job.manifest(tuple(map(read_shard, facts)), labels).write(job.out)
    for path in [job.out / SETTINGS, *map(job.facts, range(len(job.shards)))]:
        path.unlink(missing_ok=True)
    return type(job.manifest()).read(job.out)


def _classes(job: Job, facts: list[dict[str, Any]]) -> Classes:
    """Labels of the pictures that were encoded, and their names."""
    counts: Counter = Counter()
    for fact in facts:
        known = fact.get(LABEL_COUNTS)
        if known is None:  # of a finished cache of which another file was lost
            found, views = label_counts(job.out / fact["name"]), job.manifest().views
            known = {k: n // views for k, n in found.items()}
        counts.update({int(k): n for k, n in known.items()})
    said = job.source.classes()
    return Classes(dict(sorted(counts.items())), said.names if said else ())


def _claim(job: Job) -> None:
    """Settle that this folder is made with these settings.

    A finished cache of which files are missing or cut is begun again with those that are good.
    """
    manifest, begun, ours = job.out / MANIFEST, job.out / SETTINGS, job.manifest()
    settings, finished = ours.settings(), type(ours).read(job.out) if manifest.exists() else None
    there = settings
    if finished:
        there = finished.settings()
    elif begun.exists():
        there = json.loads(begun.read_text())
    elif others := [p.name for p in job.out.iterdir() if p.name[0] != "." and p != begun]:
        raise InputError(
            f"{job.out} has other files ({others[0]}): give an empty --out or a new one"
        )
    if different := [name for name in settings if not _same(settings[name], there.get(name))]:
        raise InputError(
            f"{job.out} holds a {ours.what} made with other settings ({', '.join(different)}): "
            "give another --out, or the settings it was begun with"
        )
    if not job.process_index:
        for stale in job.out.glob(".*.partial"):
            stale.unlink()  # of processes that were killed
        if not finished:
            _write_json(begun, settings)
        elif any(shard.problem(job.out) for shard in finished.shards):
            _write_json(begun, settings)
            for shard, facts in enumerate(finished.shards):
                _write_json(job.facts(shard), asdict(facts))
            manifest.unlink()
    _wait(job, "the settings are written")


def _same(ours: Any, theirs: Any) -> bool:
    """Equal, but for entries that only one of two dicts has: versions add some."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return all(ours[k] == theirs[k] for k in ours.keys() & theirs.keys())
    return ours == theirs


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")


def _wait(job: Job, what: str) -> None:
    if job.process_count > 1:
        multihost_utils.sync_global_devices(f"prepare: {what}")


def _write_shard(
    job: Job, shard: int, stream: Iterator[dict[str, Any]], bar: Any, skip_unreadable: bool
) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    path, pictures = job.out / job.name(shard), job.shards.records(shard)
    records, labels, unreadable = 0, [], []
    with atomic(path) as temporary:
        writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        try:
            while True:
                chunk = next(stream)
                first, stop = (int(i) for i in chunk["chunk"])
                for row in range(stop - first):
                    if not chunk["readable"][row]:
                        problem = explain(job.source, first + row)
                        if not skip_unreadable:
                            raise InputError(
                                f"cannot read {problem} of {job.source.name}: mend or remove it, "
                                "or give --unreadable=skip; the shards made so far are kept"
                            )
                        unreadable.append(problem)
                        continue
                    label = int(chunk["label"][row])
                    labels.append(label)
                    for arrays in chunk["made"]:
                        values = tuple(array[row] for array in arrays)
                        check_finite(job, first + row, values)
                        writer.write(job.made.record(values, label))
                        records += 1
                bar.update(stop - first)
                if stop == pictures.stop:
                    break
        finally:
            writer.close()
        extremes = (min(labels), max(labels)) if labels else None
        size, digest = temporary.stat().st_size, sha256(temporary)
        facts = Shard(path.name, size, digest, records, extremes, tuple(unreadable))
        if isinstance(path, ObjectPath):
            save_index(path, temporary, records, job.manifest().record_bytes)
    counts = Classes.of(np.int32(labels)).counts
    _write_json(job.facts(shard), asdict(facts) | {LABEL_COUNTS: counts})
