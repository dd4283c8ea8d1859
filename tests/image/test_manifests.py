"""Every manifest fits the schema of what reads it: Kubernetes, JobSet, Compose. No network, no cluster."""

import copy
import json
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import yaml
from kubeflow_trainer_api.models.io_k8s_api_batch_v1_job import IoK8sApiBatchV1Job
from kubeflow_trainer_api.models.io_k8s_api_core_v1_service import IoK8sApiCoreV1Service
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

ROOT = Path(__file__).parents[2]
KINDS = {
    ("v1", "Service"): IoK8sApiCoreV1Service,
    ("batch/v1", "Job"): IoK8sApiBatchV1Job,
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): JobsetV1alpha2JobSet,
}
MANIFESTS = {
    f"{path.name}: {each['kind']}": each
    for path in sorted((ROOT / "docker").glob("*.yaml"))
    for each in yaml.safe_load_all(path.read_text())
}


def check(manifest):
    """Raise ValueError for a value of a wrong type or a missing field, and return the fields that nobody reads."""
    kind = KINDS[manifest["apiVersion"], manifest["kind"]]
    return sorted(_unread(manifest, kind.from_dict(copy.deepcopy(manifest)).to_dict()))


def _unread(given, read, path=""):
    """Yield the place of each value that is not in what was read."""
    if isinstance(given, dict):
        for key, value in given.items():
            if key not in read:
                yield f"{path}.{key}"
            else:
                yield from _unread(value, read[key], f"{path}.{key}")
    elif isinstance(given, list):
        for index, (value, other) in enumerate(zip(given, read, strict=True)):
            yield from _unread(value, other, f"{path}[{index}]")
    elif given != read:
        yield path


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_fits_the_schema(name):
    assert check(MANIFESTS[name]) == []


def test_there_is_a_manifest_of_each_kind():
    assert {(each["apiVersion"], each["kind"]) for each in MANIFESTS.values()} == KINDS.keys()


def job(name="job.yaml: Job"):
    found = copy.deepcopy(MANIFESTS[name])
    return found, found["spec"]


def test_a_wrong_manifest_is_found():
    wrong, spec = job()
    spec["podFailurPolicy"] = spec.pop("podFailurePolicy")
    spec["template"]["spec"]["containers"][0]["arguments"] = []
    assert check(wrong) == [".spec.podFailurPolicy", ".spec.template.spec.containers[0].arguments"]
    for change in (
        lambda spec: spec["podFailurePolicy"]["rules"][0].update(action="Fail"),
        lambda spec: spec["podFailurePolicy"]["rules"][0]["onExitCodes"].update(values=["two"]),
        lambda spec: spec.update(backoffLimit="ten"),
        lambda spec: spec.pop("template"),
    ):
        wrong, spec = job()
        change(spec)
        with pytest.raises(ValueError, match="validation error"):
            check(wrong)


def compose_schema():
    file = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = json.loads(file.read_text())
    return jsonschema.validators.validator_for(schema)(schema)


def test_compose_file_fits_the_schema():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert [error.message for error in compose_schema().iter_errors(compose)] == []
    compose["services"]["train"]["restarts"] = "no"
    compose["services"]["train"]["shm_size"] = []
    assert len(list(compose_schema().iter_errors(compose))) == 2
