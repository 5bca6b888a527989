"""A stand-in for kubectl and the Job and JobSet controllers of a cluster: `kubectl apply -f -`.

Pods are processes of this machine, started with the commands and the environment of the manifest.
A pod that ends otherwise than with 0 is judged by the policies of the manifest, as Kubernetes does
(kubernetes.io/docs/tasks/job/pod-failure-policy, jobset.sigs.k8s.io/docs/tasks/failure_policy). A
file FAKE/disrupted/NAME gives the pod of that name the condition DisruptionTarget, once. Ends when
all is done (0) or failed (1); FAKE/events has a line for everything that happened.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml

FAKE = Path(os.environ["FAKE"])


def event(text: str) -> None:
    with (FAKE / "events").open("a") as f:
        f.write(text + "\n")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Job:
    """One Job: `ended` after every `step`: None, "done" or the message of its failure."""

    def __init__(self, name: str, spec: dict, more: dict[str, str]):
        self.name, self.spec, self.more = name, spec, more
        self.port, self.failures = free_port(), 0
        self.pods = {k: self._start(k) for k in range(spec["completions"])}
        self.over: set[int] = set()

    def _start(self, k: int) -> subprocess.Popen:
        pod = self.spec["template"]["spec"]
        (container,) = pod["containers"]
        env = os.environ | self.more
        for entry in container.get("env", []):
            value = entry.get("value", str(k))  # the only reference: the index of the pod
            env[entry["name"]] = re.sub(
                rf"^{self.name}-0\.\S+:\d+$", f"localhost:{self.port}", value
            )
        if "JAX_PROCESS_ID" not in env and "PEERS" in self.more:  # a TPU tells jax, a CPU does not
            index = int(self.more["MEGASCALE_SLICE_ID"]) * self.spec["completions"] + k
            env |= {"JAX_PROCESS_ID": str(index), "JAX_NUM_PROCESSES": self.more["PEERS"]}
        started = subprocess.Popen(
            [word.replace("$$(", "$(") for word in container["command"]],
            env=env,
            start_new_session=True,
        )
        (FAKE / "pids").mkdir(exist_ok=True)
        (FAKE / "pids" / f"{self.name}-{k}").write_text(str(started.pid))
        event(f"started {self.name}-{k}")
        return started

    def step(self) -> str | None:
        for k, pod in self.pods.items():
            code = pod.poll()
            if code is None or k in self.over:
                continue
            code = code if code >= 0 else 128 - code
            event(f"ended {self.name}-{k} {code}")
            if code == 0:
                self.over.add(k)
                continue
            action, why = self._judge(k, code)
            if action == "FailJob":
                return f"PodFailurePolicy: {why}"
            self.failures += action == "Count"
            if self.failures > self.spec.get("backoffLimit", 6):
                return "BackoffLimitExceeded: Job has reached the specified backoff limit"
            self.pods[k] = self._start(k)
        return "done" if len(self.over) == len(self.pods) else None

    def _judge(self, k: int, code: int) -> tuple[str, str]:
        mark = FAKE / "disrupted" / f"{self.name}-{k}"
        disrupted = mark.exists()
        mark.unlink(missing_ok=True)
        for index, rule in enumerate(self.spec["podFailurePolicy"]["rules"]):
            codes = rule.get("onExitCodes")
            if (code in codes["values"]) if codes else disrupted:
                return rule["action"], f"exit code {code} matching FailJob rule at index {index}"
        return "Count", ""

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when the grace period is over."""
        for pod in self.pods.values():
            if pod.poll() is None:
                os.killpg(pod.pid, signal.SIGTERM)
        for pod in self.pods.values():
            try:
                pod.wait(self.spec["template"]["spec"]["terminationGracePeriodSeconds"])
            except subprocess.TimeoutExpired:
                os.killpg(pod.pid, signal.SIGKILL)
                pod.wait()


def until_ended(jobs: list[Job]) -> str:
    while True:
        ends = [job.step() for job in jobs]
        if failed := [end for end in ends if end not in (None, "done")]:
            return failed[0]
        if all(end == "done" for end in ends):
            return "done"
        time.sleep(0.02)


def run_job(job: dict) -> str:
    running = Job(job["metadata"]["name"], job["spec"], {})
    end = until_ended([running])
    running.stop()
    return end


def start_set(jobset: dict) -> list[Job]:
    (group,) = jobset["spec"]["replicatedJobs"]
    slices, spec = group["replicas"], group["template"]["spec"]
    name, peers = f"{jobset['metadata']['name']}-{group['name']}", slices * spec["completions"]
    more = {"PEERS": str(peers), "MEGASCALE_NUM_SLICES": str(slices)}
    if peers > 1:
        more["JAX_COORDINATOR_ADDRESS"] = f"localhost:{free_port()}"
    else:
        del more["PEERS"]
    return [Job(f"{name}-{k}", spec, more | {"MEGASCALE_SLICE_ID": str(k)}) for k in range(slices)]


def run_set(jobset: dict) -> str:
    policy, restarts = jobset["spec"]["failurePolicy"], 0
    while True:
        jobs = start_set(jobset)
        end = until_ended(jobs)
        for job in jobs:
            job.stop()
        if end == "done":
            return end
        action = action_of(policy["rules"], *end.split(": ", 1))
        event(f"{action} {end}")
        if action == "FailJobSet":
            return end
        restarts += action == "RestartJobSet"
        if restarts > policy["maxRestarts"]:
            return end


def action_of(rules: list[dict], reason: str, message: str) -> str:
    for rule in rules:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        reasons = rule.get("onJobFailureReasons") or [reason]
        if reason in reasons and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def main() -> int:
    manifest = list(yaml.safe_load_all(sys.stdin))[-1]  # a Service needs nothing here
    end = {"Job": run_job, "JobSet": run_set}[manifest["kind"]](manifest)
    print(end)
    return 0 if end == "done" else 1


if __name__ == "__main__":
    sys.exit(main())
