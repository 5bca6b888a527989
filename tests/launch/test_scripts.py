"""What is the same in all launch scripts: refusals, dry runs, data preparation."""

import subprocess
from pathlib import Path

import pytest

from tests.launch.standins import LAUNCH, call, install

POD = ["--name=pod", "--zone=here", "--type=v5litepod-16", "--version=v2", "--repo=https://x.y/z"]
TPU = ["--name=a", "--image=i"]
POOL = ["--name=a", "--cluster=c", "--location=r"]


@pytest.mark.parametrize(
    ("script", "args", "line"),
    [
        ("tpu_pod.sh", [], "give an action"),
        ("tpu_pod.sh", ["start", *POD], "unknown action 'start'"),
        ("tpu_pod.sh", ["create", "--name=a"], "--zone=... (or PPFLOW_ZONE in the environment)"),
        ("tpu_pod.sh", ["run", "--name=a", "--zone=b"], "give the command after --"),
        (
            "tpu_pod.sh",
            ["create", *POD, "--type=tpu7x-16"],
            "launch/gke_tpu.sh starts runs on TPU7x",
        ),
        ("tpu_pod.sh", ["keep", *POD, "--restarts=-1"], "--restarts=-1: write a whole number"),
        ("slurm.sh", ["--nodes=2", "--gpu=8"], "unknown flag --gpu; there are: nodes gpus"),
        ("slurm.sh", ["--nodes=2", "--gpus=8"], "give the command after --"),
        ("slurm.sh", ["--nodes=two", "--gpus=8", "--", "a"], "--nodes=two: write a whole number"),
        ("slurm.sh", ["python"], "unexpected argument 'python'"),
        ("k8s.sh", ["--name=A"], "--image=..."),
        ("prepare_data.sh", ["--source=a", "--vae=b", "--out=c"], "write vae:DIR or taesd:DIR"),
        ("ssh.sh", [], "give an action"),
        ("ssh.sh", ["go", "--hosts=a"], "unknown action 'go'"),
        ("ssh.sh", ["run", "--hosts=a,-x"], "'-x' is no name"),
        ("ssh.sh", ["run", "--hosts=a", "--gpus=0", "--", "b"], "--gpus=0: write a whole number"),
        ("ssh.sh", ["setup", "--hosts=a"], "--repo=..."),
        ("ssh.sh", ["run", "--hosts=a", "--name=../b", "--", "c"], "letters, digits, _ . -"),
        ("gke_tpu.sh", ["run", *TPU, "--type=v7:2x2"], "the chip one of v5e, v5p, v6e, tpu7x"),
        ("gke_tpu.sh", ["run", *TPU, "--type=v6e"], "write v6e:TOPOLOGY; there are: 1x1 2x2"),
        ("gke_tpu.sh", ["run", *TPU, "--type=v6e:3x3"], "there are: 1x1 2x2 2x4 4x4"),
        ("gke_tpu.sh", ["run", *TPU, "--type=v5p:4x4x6"], "2x4x4, and multiples of 4"),
        ("gke_tpu.sh", ["run", *TPU, "--type=tpu7x:8x4x4"], "the smallest first"),
        ("gke_tpu.sh", ["run", *TPU, "--type=v5p:16x16x28"], "up to 6144 chips"),
        ("gke_tpu.sh", ["run", *TPU, "--type=v5e:2x2", "--slices=2"], "only slices of several"),
        ("gke_tpu.sh", ["run", *TPU, "--type=v5e:4x4"], "give the command after --"),
        ("gke_tpu.sh", ["pools", *POOL[:2], "--type=v5e:4x4"], "--location=..."),
        ("gke_tpu.sh", ["run", "--name=a" + 40 * "b", "--type=v5e:4x4"], "at most 40"),
        ("worker.sh", [], "give start, stop or code"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(script, args, line):
    bare = not args or script == "worker.sh" or "--" in args
    code, out, err = call(script, *args[:1], *([] if bare else ["--dry_run"]), *args[1:])
    assert code == 2 and not out
    assert err.startswith(script) and line in err and err.count("\n") == 1


def test_a_program_that_is_not_there_or_fails_stops_the_script(tmp_path):
    args = ["--source=a", "--vae=vae:b", "--out=c"]
    code, _, err = call("prepare_data.sh", *args, "--python=no-such-python")
    assert code == 2 and "no-such-python is not installed here" in err
    env = install(tmp_path, python='echo "$@" >> "$FAKE/calls"; exit 7')
    code, _, err = call("prepare_data.sh", *args, **env)
    assert code == 7 and "prepare_data.sh: stopped, exit code 7" in err
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_data_preparation(tmp_path):
    args = ["--source=images:a b", f"--vae=taesd:{tmp_path}/w", "--out=o", "--dry_run"]
    lines = pasted(tmp_path, call("prepare_data.sh", *args, "--weights=f", "--", "--flips=both")[1])
    assert [line[:3] for line in lines] == [
        ["python", "-m", "ppflow_jax.convert"],
        ["python", "-m", "ppflow_jax.prepare"],
        ["python", "-m", "ppflow_jax.prepare"],
    ]
    assert "--source=images:a b" in lines[1] and "--flips=both" in lines[1]
    assert lines[2][3:] == ["--out=o", "--verify"]
    (tmp_path / "w").mkdir()
    assert len(pasted(tmp_path, call("prepare_data.sh", *args, "--weights=f")[1])) == 2


def paste(text: str, env: dict[str, str]) -> None:
    """Run what --dry_run printed."""
    done = subprocess.run(["bash", "-e"], input=text, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")


def pasted(folder: Path, text: str) -> list[list[str]]:
    """The calls that a shell makes of what --dry_run printed, word by word."""
    note = (
        """printf '%s\\0' "${0##*/}" "$@" >> "$FAKE/pasted"; printf '\\n\\0' >> "$FAKE/pasted" """
    )
    names = ("gcloud", "ssh", "sbatch", "xpk", "python")
    (folder / "pasted").write_text("")
    paste(text, install(folder, **dict.fromkeys(names, note)))
    lines = (folder / "pasted").read_text().split("\n\0")[:-1]
    return [line.split("\0")[:-1] for line in lines]


AWKWARD = ["ppflow", "train", "--config.a=(1, 2)", "it's", '$(x) `y` \\ "q"', "*", ""]
COMMAND = "for word; do case $word in --command=*) text=${word#--command=} ;; esac; done; cd\n"
# What is behind each program, up to the command of the user: `got` keeps its words.
BEHIND = {
    "slurm.sh": (["--nodes=2", "--gpus=8"], "sbatch", 'got "${@:5}"'),
    "tpu_pod.sh": (["run", *POD[:2]], "gcloud", f'{COMMAND}exec bash -c "$text"'),
    "ssh.sh": (
        ["run", "--hosts=a", "--dir=my runs"],
        "ssh",
        'cd; bash() { got "${@:4}"; }; eval "${@: -1}"',
    ),
    "gke_tpu.sh": (
        ["xpk", *TPU, "--type=v6e:16x16", "--cluster=c", "--zone=z"],
        "xpk",
        f'{COMMAND}eval "got $text"',
    ),
}


@pytest.mark.parametrize("script", BEHIND)
def test_what_a_dry_run_prints_can_be_pasted(tmp_path, script):
    """The command of the user arrives word for word where it will run."""
    args, program, behind = BEHIND[script]
    out = call(script, *args, "--dry_run", "--", *AWKWARD)[1]
    assert max(map(len, out.splitlines())) < 190
    got = """got() { printf '<%s>' "$@" > "$FAKE/got"; }\n"""
    env = install(tmp_path, **{program: got + behind}) | {"HOME": str(tmp_path)}
    (tmp_path / "my runs").mkdir()
    worker = tmp_path / "ppflow_jax" / "launch" / "worker.sh"
    worker.parent.mkdir(parents=True)
    worker.write_text(f'#!/usr/bin/env bash\n{got}got "${{@:3}}"')
    worker.chmod(0o755)
    paste(out, env)
    assert (tmp_path / "got").read_text() == "".join(f"<{word}>" for word in AWKWARD)


def test_manifests_of_a_dry_run_are_what_is_applied(tmp_path):
    args = ["--name=b2", "--image=r.io/p:1", "--nodes=4", "--gpus=8", "--claim=disk"]
    env = install(tmp_path, kubectl='echo "$@" > "$FAKE/calls"; cat > "$FAKE/manifest"')
    assert call("k8s.sh", *args, "--", "a", **env)[0] == 0
    assert (tmp_path / "calls").read_text() == "apply -f -\n"
    shown = call("k8s.sh", *args, "--dry_run", "--", "a")[1]
    assert shown == f"# for: kubectl apply -f -\n{(tmp_path / 'manifest').read_text()}"


def test_every_script_can_be_run():
    for path in LAUNCH.glob("*.sh"):
        sourced = "sourced" in path.read_text().lower().partition("set -E")[0]
        assert path.stat().st_mode & 0o111 or sourced, path
