"""How every command starts and fails."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags

from ppflow_jax.errors import InputError, RunError


def run(main: Callable[..., None], required: tuple[str, ...] = (), positional: str = "") -> None:
    """Parse absl flags, call `main`, and turn expected failures into one line on stderr.

    With `positional`, the name of at least one argument that is no flag, `main` takes their list.

    Exit codes: 0 done; 1 bad input or a failed run; 2 bad flags. Anything unexpected keeps its
    traceback.
    """
    program = Path(sys.argv[0])
    program = program.parent.name if program.stem == "__main__" else program.stem
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
    try:
        main(rest[1:]) if positional else main()
    except (InputError, RunError) as e:
        _fail(program, e, 1)
    except OSError as e:
        _fail(program, f"{e.strerror or e}: {e.filename}" if e.filename else e, 1)


def _fail(program: str, message: object, code: int) -> None:
    line = " ".join(str(message).split())
    print(f"{program}: {line}", file=sys.stderr, flush=True)
    sys.exit(code)
