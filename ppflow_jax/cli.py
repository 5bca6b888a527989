"""How every command starts and fails."""

from __future__ import annotations

import errno
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from ppflow_jax.checks import check_local, check_seed
from ppflow_jax.devices import processes
from ppflow_jax.errors import InputError, RunError, Stopped


def run(main: Callable[..., None], required: tuple[str, ...] = (), positional: str = "") -> None:
    """Parse absl flags, call `main`, and turn expected failures into one line on stderr.

    With `positional`, the name of at least one argument that is no flag, `main` takes their list.

    Exit codes: 0 done; 1 bad input or a failed run; 2 bad flags; 75 (EX_TEMPFAIL) stopped by a
    signal with everything saved, the same command continues; 130 stopped at once by Ctrl-C.
    Anything unexpected keeps its traceback. When one of several processes fails, none is left
    waiting: see `processes.leave`.
    """
    program = Path(sys.argv[0])
    program = program.parent.name if program.stem == "__main__" else program.stem
    try:
        for argument in sys.argv[1:]:
            name, equals, value = argument.partition("=")
            check_local(value if equals else argument, name if equals else "argument")
    except InputError as e:
        _fail(program, e, 1)
    try:
        rest = flags.FLAGS(sys.argv)
        if positional and len(rest) < 2:
            raise flags.Error(f"give {positional}")
        if len(rest) > 1 and not positional:
            raise flags.Error(f"unexpected argument {rest[1]!r}: flags are written --name=value")
        for name in required:
            if not flags.FLAGS[name].value:
                raise flags.Error(f"--{name} is required")
    # ml_collections reports bad overrides of a config with these
    except (AttributeError, KeyError) as e:
        _fail(program, f"unknown key in a --config override: {e.args[0] if e.args else e}", 2)
    except (flags.Error, TypeError, ValueError, ImportError, OSError) as e:
        # absl quotes the whole traceback of a config file that raised: its last line says why
        _fail(program, str(e).strip().splitlines()[-1] if "Traceback" in str(e) else e, 2)
    gc.set_threshold(50_000, 10, 10)  # at 700 a quarter of the time of tracing is collecting
    try:
        _check_flags()
        main(rest[1:]) if positional else main()
    except (InputError, RunError) as e:
        _fail(program, e, 1)
    except flags.Error as e:  # flags that do not go together
        _fail(program, e, 2)
    except Stopped as e:  # in all processes: they wait for each other at the exit
        if jax.process_index() == 0:
            print(f"{program}: {e}", file=sys.stderr, flush=True)
        sys.exit(os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        _fail(program, "interrupted", 130)
    except OSError as e:
        message = f"{e.strerror or e}: {e.filename}" if e.filename else e.strerror or e
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"{message}: make room on the disk, and run the same command again"
        _fail(program, message, 1)
    except Exception:
        if processes.several():
            traceback.print_exc()
            processes.leave(1)
        raise


def _check_flags() -> None:
    """What no command takes: remote addresses, seeds out of range.

    Raises:
      InputError: see `checks`.
    """
    values = {name: flags.FLAGS[name].value for name in ("seed", "config") if name in flags.FLAGS}
    if values.get("seed") is not None:
        check_seed(values["seed"], "--seed")
    config = values.get("config")
    for name, value in _leaves(config, "--config") if isinstance(config, ConfigDict) else ():
        if name == "--config.seed":
            check_seed(value, name)
        elif isinstance(value, str):
            check_local(value, name)


def _leaves(config: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value


def _fail(program: str, message: object, code: int) -> None:
    line = " ".join(str(message).split())
    if processes.several():
        program += f" (process {jax.process_index()} of {jax.process_count()})"
    print(f"{program}: {line}", file=sys.stderr, flush=True)
    processes.leave(code)
    sys.exit(code)
