"""How every command starts and fails. Nothing here imports JAX before the flags are read."""

from __future__ import annotations

import difflib
import errno
import gc
import importlib.util
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict

import ppflow_jax
from ppflow_jax.errors import InputError, RunError, Stopped, check_address, check_seed

# Flags (and arguments, by their name) that take gs:// and s3://
STORES = {
    "main": {"workdir"}
    | {f"config.{name}" for name in ("init_from", "train.teacher", "data.path", "data.vae")}
    | {f"config.{name}" for name in ("sample.decode", "eval.decode")}
    | {f"config.{name}" for name in ("eval.features", "eval.reference")},
    "convert": {"source", "target", "vae_config"},
    "evaluate": {"samples", "reference", "checkpoint", "features", "decode", "plan", "out"},
    "prepare": {"out", "path", "vae", "fields"},
    "probe": {"checkpoint", "out", "path", "vae"},
    "prune": {"checkpoint", "out", "path", "target", "vae"},
    "push": {"RUN hf:OWNER/REPO"},
    "rank": {"source", "target", "config.data.path", "config.data.vae"},
    "report": {"RUN...", "out", "decode"},
    "sample": {"checkpoint", "out", "noise", "requests", "weak", "plan", "decode"},
    "serve": {"checkpoint", "decode", "plan"},
    "tune": {"checkpoint", "out", "calibration", "data"},
}
# and those that take weights or datasets of the hub, hf:
WEIGHTS = {"config.init_from", "config.train.teacher", "config.data.vae", "config.sample.decode"}
WEIGHTS |= {"config.eval.decode", "config.eval.features", "config.data.path"}
WEIGHTS |= {"checkpoint", "weak", "source", "decode", "vae", "fields", "features", "path"}


def run(main: Callable[..., None], required: tuple[str, ...] = (), positional: str = "") -> None:
    """Parse absl flags, call `main`, and turn expected failures into one line on stderr.

    With `positional`, the name of at least one argument that is no flag, `main` takes their list.
    `--help` prints the docstring of `main`'s module and its flags, `--version` the version.

    Exit codes: 0 done; 1 bad input or a failed run; 2 bad flags; 75 (EX_TEMPFAIL) stopped by a
    signal with everything saved, the same command continues; 130 stopped at once by Ctrl-C; 134
    one of several processes lost another, the same command continues from the last checkpoint.
    Anything unexpected keeps its traceback. When one of several processes fails, none is left
    waiting: see `processes.leave`.
    """
    program = Path(sys.argv[0])
    program = program.parent.name if program.stem == "__main__" else program.stem
    _answer(main, required)
    rest = _parse(program, required, positional)
    gc.set_threshold(50_000, 10, 10)  # at 700 a quarter of the time of tracing is collecting
    try:
        _check_flags()
        main(rest[1:]) if positional else main()
    except (InputError, RunError) as e:
        _fail(program, e, 1)
    except flags.Error as e:  # flags that do not go together
        _fail(program, e, 2)
    except Stopped as e:  # in all processes: they wait for each other at the exit
        import jax

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
    except Exception as e:
        from ppflow_jax.devices import processes

        if why := processes.without_device():
            _fail(program, why, 1)
        if processes.lost_peer(e):
            _fail(program, e, 1)
        if processes.several():
            traceback.print_exc()
            processes.leave(1)
        raise


def _answer(main: Callable[..., None], required: tuple[str, ...]) -> None:
    """What is asked without running anything."""
    asked = set(sys.argv[1:])
    if asked & {"--help", "-h"}:
        print(usage(main, required))
        sys.exit(0)
    if "--version" in asked:
        print(f"ppflow_jax {ppflow_jax.__version__}")
        sys.exit(0)


def _parse(program: str, required: tuple[str, ...], positional: str) -> list[str]:
    """Set the flags; the program and the arguments that are none come back."""
    try:
        before = ""
        for argument in sys.argv[1:]:
            name, equals, value = argument.partition("=")
            if not equals and before.startswith("-") and "=" not in before:  # --name value
                name, equals, value = before, "=", argument
            flag = name.lstrip("-") if equals else positional
            check_address(
                value if equals else argument,
                name if equals else "argument",
                flag in STORES.get(program, ()),
                _reads_hub(program, flag),
            )
            before = argument
    except InputError as e:
        _fail(program, e, 1)
    try:
        rest = flags.FLAGS([sys.argv[0], *map(_config_by_name, sys.argv[1:])])
        if positional and len(rest) < 2:
            raise flags.Error(f"give {positional}")
        if len(rest) > 1 and not positional:
            raise flags.Error(f"unexpected argument {rest[1]!r}: flags are written --name=value")
        for name in required:
            if not flags.FLAGS[name].value:
                raise flags.Error(f"--{name} is required")
        return rest
    # ml_collections reports bad overrides of a config with these
    except (AttributeError, KeyError):
        _fail(program, _unknown_key(sys.argv[1:]), 2)
    except (flags.Error, TypeError, ValueError, ImportError, OSError) as e:
        # absl quotes the whole traceback of a config file that raised: its last line says why
        _fail(program, str(e).strip().splitlines()[-1] if "Traceback" in str(e) else e, 2)


def _reads_hub(program: str, flag: str) -> bool:
    if program == "push":
        return flag == "RUN hf:OWNER/REPO"
    kinds = {(name, "source") for name in ("prepare", "probe", "prune")}  # of datasets
    return flag in WEIGHTS and (program, flag) not in kinds


def _unknown_key(arguments: list[str]) -> str:
    """The first key in the overrides of a config that it does not have, and what it has there."""
    names = [argument.lstrip("-").partition("=")[0] for argument in arguments]
    where = names.index("config")
    path = _config_by_name(arguments[where]).partition("=")[2] or arguments[where + 1]
    try:
        config = flags.FLAGS["config"].parser.parse(path)
    except Exception as e:  # whatever somebody's file raises
        return f"--config={path} raises {e!r}: mend it"
    for name in names:
        if not name.startswith("config."):
            continue
        section = config
        for key in name.split(".")[1:]:
            if not isinstance(section, ConfigDict):
                return f"--{name}: {key!r} is below a value: leave it out"
            if key not in section:
                near = difflib.get_close_matches(key, section, 3, 0.5)
                said = f"Did you mean {' or '.join(near)}? " if near else ""
                return f"--{name}: unknown key {key!r}: {said}There are {', '.join(section)}"
            section = section[key]
    return f"unknown key in an override of --config={path}: see its file"


def packaged(folder: str) -> Path:
    """`configs` or `launch`: in the package where it is installed, beside it in the checkout."""
    package = Path(ppflow_jax.__file__).parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def _config_by_name(argument: str) -> str:
    """`--config=ppflow_b2` is the file of that name in `configs`; paths stay as they are.

    Raises:
      flags.Error: there is none.
    """
    match = re.fullmatch(r"(--?config=)([A-Za-z0-9_]+)(:.*)?", argument)
    if not match:
        if importlib.util.find_spec("configs") is None:  # a file may build on them from anywhere
            _import_packaged_configs()
        return argument
    folder = packaged("configs")
    names = sorted(path.stem for path in folder.glob("[!_]*.py"))
    if match[2] not in names:
        near = difflib.get_close_matches(match[2], names, 3) or names
        raise flags.Error(
            f"no config {match[2]}: give a file, or one of those that come with the package, as "
            f"{', '.join(near)}"
        )
    # They import each other as `configs`, whatever else is called so.
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        del sys.modules[name]
    _import_packaged_configs()
    return f"{match[1]}{folder / match[2]}.py{match[3] or ''}"


def _import_packaged_configs() -> None:
    folder = packaged("configs")
    spec = importlib.util.spec_from_file_location(
        "configs", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["configs"] = importlib.util.module_from_spec(spec)


def usage(main: Callable[..., None], required: tuple[str, ...] = ()) -> str:
    """What a command does, its flags and their defaults."""
    module = sys.modules[main.__module__]
    lines = [(module.__doc__ or "").strip(), "", "Flags:"]
    for holder in vars(module).values():
        if not isinstance(holder, flags.FlagHolder):
            continue
        flag = flags.FLAGS[holder.name]
        text = f"{flag.help or ''}"
        if holder.name in required:
            text += " Required."
        elif holder.default not in (None, "", []):
            default = holder.default
            shown = ",".join(map(str, default)) if isinstance(default, list) else default
            text += f" Default: {str(shown).lower() if shown is True or shown is False else shown}."
        lines += textwrap.wrap(
            f"--{holder.name}  {text}",
            96,
            initial_indent="  ",
            subsequent_indent="      ",
            break_on_hyphens=False,
        )
    return "\n".join(lines)


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
            flag = name.removeprefix("--")
            check_address(value, name, flag in STORES["main"], flag in WEIGHTS)


def numbers(name: str, texts: list[str]) -> tuple[float, ...]:
    """The numbers of a flag.

    Raises:
      InputError: something else.
    """
    try:
        return tuple(map(float, texts))
    except ValueError as e:
        raise InputError(f"--{name}={','.join(texts)}: {e}; write e.g. --{name}=0.4,1") from e


def _leaves(config: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value


def _fail(program: str, message: object, code: int) -> NoReturn:
    """Ends with one line; a lost peer behind the exception being handled has a code of its own."""
    line, leave = " ".join(str(message).split()), None
    if "jax" in sys.modules:  # else no peers are waiting
        import jax

        from ppflow_jax.devices import processes

        leave = processes.leave
        if why := processes.lost_peer(sys.exc_info()[1]):
            line = f"lost another process, whose output says why ({why})"
            line, code = f"{line}: run the same command again", processes.LOST
        if processes.several():
            program += f" (process {jax.process_index()} of {jax.process_count()})"
    print(f"{program}: {line}", file=sys.stderr, flush=True)
    if leave:
        leave(code)
    sys.exit(code)
