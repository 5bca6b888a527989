"""The GPU hour at tiny size, killed at random moments, continued and compared with its records.

    python -m tests.acceptance.gpu_hour_kills --out=DIR [--kills=5] [--parts=...] [--seed=0]

After every SIGKILL all records must be readable, no process may be left, and rows and parts that
were there must stay as they are; the last call must end with everything done. Exit code 0 only if
all holds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

STATES = ("", "running", "done", "cut", "failed", "skipped")
LONGEST = 60.0  # seconds until a kill


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--parts", default="")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = trial(args.out, args.kills, args.parts, random.Random(args.seed))
    print("\n".join(found) or "PASS")
    return int(bool(found))


def trial(out: Path, kills: int, parts: str, moments: random.Random) -> list[str]:
    """What did not hold."""
    command = [sys.executable, "-m", "benchmarks.gpu_hour", f"--out={out}", "--tiny"]
    command += ["--minutes=60"]  # enough for a busy machine
    command += [f"--parts={parts}"] * bool(parts)
    wrong: list[str] = []
    for number in range(kills):
        before = records(out)
        process = subprocess.Popen(command, start_new_session=True)
        try:
            process.wait(moments.uniform(1, LONGEST))
            print(f"kill {number}: it had ended before, exit code {process.returncode}", flush=True)
            break
        except subprocess.TimeoutExpired:
            os.kill(
                process.pid, signal.SIGKILL
            )  # the runner alone: its parts must end by themselves
            process.wait()
        wrong += [f"kill {number}: processes are left"] * (not alone(process.pid))
        after = records(out)
        wrong += [f"kill {number}: {line}" for line in lost(before, after)]
        said = {name: f"{r['state']}, {len(r['rows'])} rows" for name, r in after.items()}
        print(f"kill {number}: {said}", flush=True)
    done = {n: r for n, r in records(out).items() if r["state"] == "done"}
    code = subprocess.run(command).returncode
    wrong += [f"the last call ended with exit code {code}"] * bool(code)
    wrong += [f"{n} was done and was done again" for n, r in done.items() if records(out)[n] != r]
    report = (out / "report.md").read_text() if (out / "report.md").exists() else ""
    wrong += [
        f"{name} is not in the report" for name in records(out) if f"| {name} |" not in report
    ]
    return wrong


def records(out: Path) -> dict[str, dict]:
    """Of all parts.

    Raises:
      ValueError: one that cannot be read.
    """
    other = ("device.json", "settings.json")
    found = {p.stem: json.loads(p.read_text()) for p in out.glob("*.json") if p.name not in other}
    if bad := [name for name, record in found.items() if record["state"] not in STATES]:
        raise ValueError(f"{bad[0]} has the state {found[bad[0]]['state']!r}")
    return found


def lost(before: dict[str, dict], after: dict[str, dict]) -> list[str]:
    """Rows that were there, without error, and are not."""
    return [
        f"{name} lost {row['key']}"
        for name, record in before.items()
        for row in record["rows"]
        if "error" not in row and row not in after.get(name, {"rows": []})["rows"]
    ]


def alone(session: int) -> bool:
    """Whether all processes of a session end within some seconds."""
    for _ in range(100):
        if not _members(session):
            return True
        time.sleep(0.1)
    return False


def _members(session: int) -> list[int]:
    """Processes of a session that are no zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, member = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended
            continue
        if int(member) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main())
