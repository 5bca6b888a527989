"""Manifests for Kubernetes: against its schemas, and under a stand-in for its controllers."""

import re
import subprocess
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from tests.launch.standins import KUBECTL, LAUNCH, call, install, preempt
from tests.launch.test_scripts import pasted

GPU = ["--name=b2", "--image=r.io/p:1", "--nodes=2", "--gpus=8", "--claim=disk"]
TPU = ["--name=xl", "--image=r.io/p:1"]
VERSIONS = ("1.30", "1.34", "1.37")
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}


def rendered(script: str, *args: str) -> list[dict]:
    out = call(script, *args, "--dry_run", "--", "python", "-m", "x", '--a="b\\c" $(HOME)')[1]
    assert "${" not in out
    return list(yaml.safe_load_all(out))


def check_core(manifest: dict) -> None:
    """By the JSON schemas of Kubernetes, which allow no unknown field."""
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


def check_jobset(manifest: dict) -> None:
    """By the types of JobSet's own API, field by field, and its Jobs by Kubernetes'."""
    known = JobsetV1alpha2JobSet.from_dict(manifest).to_dict()
    assert known == manifest, "unknown fields"
    names = [rule["name"] for rule in manifest["spec"]["failurePolicy"]["rules"]]
    assert len(set(names)) == len(names)
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        assert rule["action"] in ACTIONS
    for group in manifest["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": group["name"]}}
        check_core(job | {"spec": group["template"]["spec"]})
        pod = f"{manifest['metadata']['name']}-{group['name']}-{group['replicas'] - 1}-1023-abcde"
        assert len(pod) <= 63


def test_the_gpu_manifest():
    service, job = rendered("k8s.sh", *GPU, "--grace=120")
    check_core(service)
    check_core(job)
    assert service["spec"] == {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"job-name": "b2"},
    }
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert spec["backoffLimit"] == 40 and pod["terminationGracePeriodSeconds"] == 120
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "x", '--a="b\\c" $$(HOME)']
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    env = {e["name"]: e.get("value") for e in container["env"]}
    assert env["JAX_COORDINATOR_ADDRESS"] == "b2-0.b2:8476" and pod["subdomain"] == "b2"
    assert env["JAX_NUM_PROCESSES"] == "2" and pod["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    ("kind", "accelerator", "hosts", "chips"),
    [
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
        ("v5e:2x4", "tpu-v5-lite-podslice", 2, 4),
        ("v5p:2x2x1", "tpu-v5p-slice", 1, 4),
        ("v5p:4x4x8", "tpu-v5p-slice", 32, 4),
        ("v6e:16x16", "tpu-v6e-slice", 64, 4),
        ("tpu7x:4x4x4", "tpu7x", 16, 4),
    ],
)
@pytest.mark.parametrize("more", [[], ["--spot=yes", "--claim=disk", "--slices=2"]])
def test_the_tpu_manifest(kind, accelerator, hosts, chips, more):
    if more and hosts == 1:
        more = more[:2]
    (jobset,) = rendered("gke_tpu.sh", "run", *TPU, f"--type={kind}", *more)
    check_jobset(jobset)
    place = jobset["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert place == "cloud.google.com/gke-nodepool"
    (group,) = jobset["spec"]["replicatedJobs"]
    job, pod = group["template"]["spec"], group["template"]["spec"]["template"]["spec"]
    assert group["replicas"] == (2 if "--slices=2" in more else 1)
    assert job["completions"] == job["parallelism"] == hosts and job["backoffLimit"] == 0
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    topology = kind.partition(":")[2]
    selector = {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    if accelerator == "tpu7x":
        selector["cloud.google.com/placement-policy-name"] = f"tpu7x-{topology}"
    if more:
        selector["cloud.google.com/gke-spot"] = "true"
        assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
        assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}
    assert pod["nodeSelector"] == selector


def test_the_check_of_manifests_can_fail():
    (jobset,) = rendered("gke_tpu.sh", "run", *TPU, "--type=v6e:4x4")
    (group,) = jobset["spec"]["replicatedJobs"]
    job, pod = group["template"]["spec"], group["template"]["spec"]["template"]["spec"]
    for place, key in (
        (jobset["spec"], "replicas"),
        (jobset["spec"]["failurePolicy"], "backoffLimit"),
        (group, "parallelism"),
        (job, "completion"),
        (pod, "nodeSelectors"),
    ):
        place[key] = 1
        with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
            check_jobset(jobset)
        del place[key]
    check_jobset(jobset)


def test_node_pools_and_the_workload_policy_of_tpu7x(tmp_path):
    pool = [
        "--name=xl",
        "--cluster=c",
        "--location=us-central1",
        "--zone=us-central1-c",
        "--dry_run",
    ]
    args = ["pools", *pool, "--type=tpu7x:4x4x4", "--slices=2", "--spot=yes"]
    policy, *pools = pasted(tmp_path, call("gke_tpu.sh", *args)[1])
    assert policy[1:6] == [
        "compute",
        "resource-policies",
        "create",
        "workload-policy",
        "tpu7x-4x4x4",
    ]
    assert {"--type=HIGH_THROUGHPUT", "--accelerator-topology=4x4x4"} <= set(policy)
    assert [p[3:5] for p in pools] == [["create", "xl-0"], ["create", "xl-1"]]
    assert {"--placement-policy=tpu7x-4x4x4", "--num-nodes=16", "--spot"} <= set(pools[0])
    assert not any("--tpu-topology" in word for word in pools[0])
    (single,) = pasted(tmp_path, call("gke_tpu.sh", "pools", *pool, "--type=tpu7x:2x2x1")[1])
    assert not any("policy" in word or "topology" in word for word in single)
    (old,) = pasted(tmp_path, call("gke_tpu.sh", "pools", *pool, "--type=v6e:4x4")[1])
    assert {"--tpu-topology=4x4", "--machine-type=ct6e-standard-4t", "--num-nodes=4"} <= set(old)


def test_the_same_by_xpk(tmp_path):
    args = ["xpk", *TPU, "--type=v5e:4x4", "--slices=2", "--cluster=c", "--zone=z", "--dry_run"]
    (line,) = pasted(tmp_path, call("gke_tpu.sh", *args, "--", "ppflow", "train", "a b")[1])
    assert line[:4] == ["xpk", "workload", "create", "--workload=xl"]
    assert {"--tpu-type=v5litepod-4x4", "--num-slices=2", "--restart-on-exit-codes=75"} <= set(line)
    assert line[-1] == "--command=ppflow train 'a b'"


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(path)


# Started for the first time: waits for SIGTERM, and tells its peer; the second time all is done.
RUN = """cd "$FAKE"; k=$JAX_PROCESS_ID
trap 'touch told' TERM
[ ! -e began.$k ] || exit 0
touch began.$k
echo $k >> runs
until [ -e told ]; do sleep 0.05; done
exit 75"""
SCRIPTS = [
    ("k8s.sh", GPU, "b2"),
    ("gke_tpu.sh", ["run", *TPU, "--type=v5e:2x4"], "xl-slice-0"),
]


@pytest.mark.parametrize(("script", "args", "pod"), SCRIPTS)
def test_a_pod_that_is_preempted_restarts_the_run(tmp_path, script, args, pod):
    env = install(tmp_path, kubectl=KUBECTL)
    line = ["bash", LAUNCH / script, *args, "--restarts=1", "--", "bash", "-c", RUN]
    running = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, text=True)
    wait_for_lines(tmp_path / "runs", 2)
    preempt(tmp_path, 1)
    out, _ = running.communicate(timeout=60)
    assert (running.returncode, out) == (0, "done\n")
    events = (tmp_path / "events").read_text()
    assert re.search(rf"ended {pod}-[01] 75", events) and f"ended {pod}-1 0" in events
    assert events.count(f"started {pod}-") == 4


@pytest.mark.parametrize(("script", "args", "pod"), SCRIPTS)
@pytest.mark.parametrize(
    ("run", "disrupted", "starts", "code"),
    [
        ("exit 1", False, 1, 1),  # a run that fails is not started again
        ("exit 134", False, 3, 1),  # a machine lost without a word: --restarts of them
        ("[ $(wc -l < $FAKE/runs) -gt 8 ] || exit 75", False, 9, 0),  # stops are not counted
        ("[ $(wc -l < $FAKE/runs) -gt 1 ] || exit 1", True, 2, 0),  # nor is a node that was taken
    ],
)
def test_what_is_started_again(tmp_path, script, args, pod, run, disrupted, starts, code):
    env = install(tmp_path, kubectl=KUBECTL)
    args = ["--nodes=1" if a == "--nodes=2" else a.replace("2x4", "2x2") for a in args]
    if disrupted:
        (tmp_path / "disrupted").mkdir()
        (tmp_path / "disrupted" / f"{pod}-0").touch()
    run = f'echo x >> "$FAKE/runs"; {run}'
    got, out, err = call(script, *args, "--restarts=2", "--", "bash", "-c", run, **env)
    assert got == code, (out, err)
    assert len((tmp_path / "runs").read_text().splitlines()) == starts
