"""Publish a run on the Hugging Face hub: ppflow push RUN hf:OWNER/REPO

Its EMA as a checkpoint that every command reads as hf:OWNER/REPO, its plan, evaluations and newest
sample grid, and a page about it. What was pushed before is replaced in one commit. The token is the
one of `hf auth login`, or HF_TOKEN. Folders of this machine are not named in what is published.
"""

from __future__ import annotations

from absl import flags

from ppflow_jax import cli
from ppflow_jax.errors import InputError

_PRIVATE = flags.DEFINE_bool("private", False, "Make the repository private, if it is made now.")


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise InputError(f"give a run and hf:OWNER/REPO, got {' '.join(arguments)}")
    from ppflow_jax.report.publish import publish
    from ppflow_jax.report.run import open_runs

    print(publish(open_runs(arguments[:1])[0], arguments[1], _PRIVATE.value))


if __name__ == "__main__":
    cli.run(main, positional="RUN hf:OWNER/REPO")
