"""What a folder of kept runs was made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import flags

from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic


def same_settings(out: Path, *names: str) -> None:
    """A folder holds runs of one `--config` and one value of each of these flags; makes it.

    Raises:
      InputError: it holds others.
    """
    values = flags.FLAGS
    mine: dict[str, Any] = {"config": json.loads(values.config.to_json_best_effort())}
    mine |= {name: values[name].value for name in names}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    if not path.exists():
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(mine, indent=1))
    elif wrong := [k for k, v in json.loads(path.read_text()).items() if mine.get(k) != v]:
        raise InputError(f"{out} holds runs of another {wrong[0]}: use another --out")
