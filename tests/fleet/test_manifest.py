"""Manifests: each field is used, or a warning, or an error; and hostile files cost little."""

from __future__ import annotations

import copy
import textwrap
from contextlib import suppress

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.errors import ConfigError
from quire.fleet.diff import diff
from quire.fleet.manifest import pod, types
from quire.fleet.manifest.read import Manifest, read_manifest
from quire.fleet.spec import RoleSpec, ServiceSpec

MINIMAL = {
    "apiVersion": "serving.kserve.io/v1alpha2",
    "kind": "LLMInferenceService",
    "metadata": {"name": "svc"},
    "spec": {"model": {"uri": "hf://org/model"}},
}
PICKER = {"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig", "plugins": [{"type": "queue-scorer"}]}


@pytest.fixture
def read(tmp_path):
    def read(*documents, **more) -> Manifest:
        file = tmp_path / "llm.yaml"
        file.write_text(yaml.safe_dump_all(documents))
        return read_manifest(file, **more)

    return read


def service(spec=None, **top):
    document = copy.deepcopy(MINIMAL) | top
    document["spec"] |= spec or {}
    return document


def container(**more):
    return service({"template": {"containers": [{"name": "main", **more}]}})


def only_role(manifest: Manifest) -> RoleSpec:
    (role,) = manifest.service.roles
    return role


# --- what is used -------------------------------------------------------------------------------------------


def test_the_least_that_can_be_said(read):
    manifest = read(MINIMAL)
    assert manifest.warnings == ()
    assert manifest.policy == ()
    role = RoleSpec(role="both", replicas=1, arguments=("org/model", "--served-model-name=svc"))
    assert manifest.service == ServiceSpec(name="svc", model_name="svc", roles=(role,))


def test_everything_that_is_used(read, tmp_path):
    main = {
        "name": "main",
        "command": ["vllm", "serve"],
        "args": ["--max-num-seqs", "8", "--gpu_memory_utilization=0.25", "--no-enable-prefix-caching", "--seed", "-5"],
        "env": [
            {"name": "HF_HOME", "value": "/models"},
            {"name": "LEN", "value": "512"},
            {"name": "VLLM_ADDITIONAL_ARGS", "value": "--max-model-len '512' --api-key=secret"},
            {"name": "QUIRE_LOG_LEVEL", "value": "debug"},
        ],
        "resources": {"limits": {"cpu": "1500m", "memory": "2Gi"}},
    }
    spec = {
        "model": {"uri": "hf://org/model:v1", "name": "assistant"},
        "replicas": 3,
        "labels": {"tier": "fast"},
        "rolloutStrategy": {"maxSurge": "50%", "maxUnavailable": 0},
        "template": {"terminationGracePeriodSeconds": 60, "containers": [main]},
    }
    manifest = read(service(spec))
    assert manifest.warnings == ()
    assert manifest.service.model_name == "assistant"
    assert only_role(manifest) == RoleSpec(
        role="both",
        replicas=3,
        arguments=(
            *("org/model", "--revision=v1", "--served-model-name=assistant", "--max-num-seqs=8"),
            *("--memory-utilization=0.25", "--no-enable-prefix-caching", "--seed=-5"),
            *("--max-model-len=512", "--api-key=secret"),
        ),
        environment={"HF_HOME": "/models", "LEN": "512", "QUIRE_LOG_LEVEL": "debug"},
        cpu=1.5,
        memory=2 * 2**30,
        labels={"tier": "fast"},
        max_surge="50%",
        max_unavailable=0,
        drain_timeout=60.0,
    )


def test_a_reference_to_a_variable_is_filled_in(read):
    manifest = read(container(args=["--max-model-len=$(LEN)"], env=[{"name": "LEN", "value": "64"}]))
    assert "--max-model-len=64" in only_role(manifest).arguments


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("hf://org/model", "org/model"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("file:///models/a%20b", "/models/a b"),
        ("/models/x", "/models/x"),
        ("quire-tiny", "quire-tiny"),
        ("./here", "{dir}/here"),
        ("pvc://claim/path/to", "{dir}/claims/claim/path/to"),
    ],
)
def test_where_models_come_from(read, tmp_path, uri, expected):
    manifest = read(service({"model": {"uri": uri}}), pvc_dir=tmp_path / "claims")
    assert only_role(manifest).arguments[0] == expected.format(dir=tmp_path)


def test_prefill_is_a_role_of_its_own(read):
    workload = {"replicas": 2, "template": {"containers": [{"name": "main", "args": ["--max-num-seqs=4"]}]}}
    manifest = read(service({"replicas": 3, "prefill": workload}))
    assert [(role.role, role.replicas) for role in manifest.service.roles] == [("decode", 3), ("prefill", 2)]
    assert "--max-num-seqs=4" in manifest.service.roles[1].arguments
    assert "--max-num-seqs=4" not in manifest.service.roles[0].arguments
    assert any("none hands a KV cache" in warning for warning in manifest.warnings)


def test_the_gateways_documents_are_passed_on(read):
    objective = {
        "apiVersion": "llm-d.ai/v1alpha2",
        "kind": "InferenceObjective",
        "metadata": {"name": "high"},
        "spec": {"priority": 10},
    }
    manifest = read(objective, service({"router": {"scheduler": {"config": {"inline": PICKER}}}}))
    assert manifest.policy == (objective, PICKER)
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "epp"},
        "data": {"epp.yaml": yaml.safe_dump(PICKER)},
    }
    by_reference = service({"router": {"scheduler": {"config": {"ref": {"name": "epp", "key": "epp.yaml"}}}}})
    assert read(by_reference, config_map).policy == (PICKER,)


def test_configurations_are_merged_the_later_over_the_earlier(read):
    def config(name, spec):
        return {
            "apiVersion": "serving.kserve.io/v1alpha2",
            "kind": "LLMInferenceServiceConfig",
            "metadata": {"name": name},
            "spec": spec,
        }

    def with_main(**main):
        return {"template": {"containers": [{"name": "main", **main}]}}

    first = config("a", {"replicas": 5, "labels": {"x": "1", "y": "1"}, **with_main(args=["--seed=1"])})
    second = config("b", {"labels": {"y": "2"}, **with_main(env=[{"name": "A", "value": "2"}])})
    own = service({"baseRefs": [{"name": "a"}, {"name": "b"}], **with_main(env=[{"name": "B", "value": "3"}])})
    role = only_role(read(first, second, own))
    assert (role.replicas, role.labels) == (5, {"x": "1", "y": "2"})
    assert role.environment == {"A": "2", "B": "3"}
    assert "--seed=1" in role.arguments


def test_v1alpha1_is_read_as_well(read):
    model = {"uri": "hf://org/model", "criticality": "Critical"}
    manifest = read(service({"model": model}, apiVersion="serving.kserve.io/v1alpha1"))
    assert manifest.service.name == "svc"
    assert [warning.split(":")[0] for warning in manifest.warnings] == ["spec.model.criticality"]


# --- what is not used is said -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"parallelism": {"tensor": 2}}, "spec.parallelism.tensor"),
        ({"parallelism": {"expert": True}}, "spec.parallelism.expert"),
        ({"storageInitializer": {"enabled": True}}, "spec.storageInitializer.enabled"),
        ({"scaling": {"maxReplicas": 3}}, "spec.scaling.maxReplicas"),
        ({"worker": {"containers": []}}, "spec.worker"),
        ({"kvCacheOffloading": {"cpu": {"size": "1Gi"}}}, "spec.kvCacheOffloading.cpu"),
        ({"router": {"route": {"http": {"refs": [{"name": "r"}]}}}}, "spec.router.route.http.refs"),
        ({"router": {"gateway": {"refs": [{"name": "g"}]}}}, "spec.router.gateway.refs"),
        ({"router": {"scheduler": {"replicas": 2}}}, "spec.router.scheduler.replicas"),
        ({"tracing": {"sampler": "always_on"}}, "spec.tracing.sampler"),
        ({"template": {"volumes": [{"name": "v"}]}}, "spec.template.volumes"),
        ({"template": {"containers": [{"name": "main", "image": "i"}]}}, "spec.template.containers[0].image"),
        ({"prefill": {"annotations": {"a": "b"}}}, "spec.prefill.annotations"),
    ],
)
def test_what_is_not_used_is_named_with_the_reason(read, spec, field):
    named = [warning for warning in read(service(spec)).warnings if warning.startswith(f"{field}:")]
    assert len(named) == 1
    assert "not used by provider processes, because " in named[0]


def test_what_asks_for_nothing_needs_no_words(read):
    router = {"route": {}, "gateway": {}, "scheduler": {}}
    assert read(service({"router": router, "parallelism": {"tensor": 1}})).warnings == ()


@pytest.mark.parametrize(
    ("main", "words"),
    [
        ({"args": ["--tensor-parallel-size=4"]}, "--tensor-parallel-size: not used"),
        ({"args": ["--enforce-eager", "--seed=1"]}, "--enforce-eager: not used"),
        ({"args": ["--port", "8000"]}, "--port: not used"),
        ({"command": ["vllm", "serve", "/mnt/models"]}, "'/mnt/models': not used"),
        ({"env": [{"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"}]}, "VLLM_LOGGING_LEVEL: without effect"),
        ({"env": [{"name": "LD_PRELOAD", "value": "/x.so"}]}, "LD_PRELOAD decides which code"),
        ({"env": [{"name": "PYTHONPATH", "value": "/x"}]}, "PYTHONPATH decides which code"),
        ({"env": [{"name": "HF_ENDPOINT", "value": "http://x"}]}, "HF_ENDPOINT decides where"),
        ({"env": [{"name": "https_proxy", "value": "http://x"}]}, "https_proxy decides where"),
        ({"env": [{"name": "AWS_ENDPOINT_URL_S3", "value": "http://x"}]}, "AWS_ENDPOINT_URL_S3 decides where"),
        ({"env": [{"name": "T", "valueFrom": {"secretKeyRef": {"key": "k"}}}]}, "env[0].valueFrom: not used"),
        ({"resources": {"limits": {"nvidia.com/gpu": "1"}}}, "limits.nvidia.com/gpu: not used"),
        ({"resources": {"requests": {"cpu": "1"}}}, "resources.requests: not used"),
    ],
)
def test_flags_and_variables_without_effect_are_told(read, main, words):
    assert [warning for warning in read(container(**main)).warnings if words in warning] != []


def test_other_containers_and_other_objects_are_told(read):
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}
    spec = {"template": {"containers": [{"name": "side"}, {"name": "main", "args": ["--seed=3"]}]}}
    manifest = read(service(spec), secret)
    assert "--seed=3" in only_role(manifest).arguments
    assert any("containers[0] (side)" in warning for warning in manifest.warnings)
    assert any("document 2 (Secret)" in warning for warning in manifest.warnings)


def structs():
    for module in (types, pod):
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == module.__name__:
                yield value


@pytest.mark.parametrize("struct", [struct for struct in structs() if struct.__name__ != "Struct"])
def test_no_struct_lets_an_unknown_field_pass(struct):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"noSuchField": 1}, struct)
    assert struct.__struct_config__.forbid_unknown_fields


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "message", "remedy"),
    [
        (service({"replica": 2}), "unknown field `replica`", "Did you mean replicas?"),
        (container(arg=[]), r"unknown field `arg`.*containers\[0\]", "Did you mean args?"),
        (service({"replicas": "2"}), "Expected `int", "v1alpha2"),
        (service({"replicas": -1}), ">= 0", "v1alpha2"),
        (service({"replicas": 1, "scaling": {"maxReplicas": 2}}), "both replicas and scaling", "Keep one"),
        (service({"scaling": {"minReplicas": 3, "maxReplicas": 2}}), "above maxReplicas", "Swap"),
        (service({"model": {"uri": "oci://x/y"}}), "oci://x/y", "hf://"),
        (service({"model": {"uri": "pvc://c/p"}}), "no volume claims", "--pvc-dir"),
        (service({"model": {"uri": "x", "lora": {"adapters": [{"uri": "y"}]}}}), "adapters", "Remove"),
        (service({"model": {"uri": "x", "confidential": {"enabled": True}}}), "encrypted", "Serve"),
        (service({"model": {"uri": "x", "criticality": "Critical"}}), "v1alpha1", "InferenceObjective"),
        (service({"rolloutStrategy": {"maxSurge": "half"}}), "maxSurge is 'half'", "percentage"),
        (service({"baseRefs": [{"name": "nobody"}]}), "no such LLMInferenceServiceConfig", "same file"),
        (service(apiVersion="serving.kserve.io/v1"), "apiVersion 'serving.kserve.io/v1'", "v1alpha2"),
        (service(kind="LLMInferenceservice"), "LLMInferenceservice", "Did you mean LLMInferenceService"),
        (service(metadata={"name": "Not_A_Name"}), "Not_A_Name", "lower-case"),
        (container(args=["--max-num-seq=8"]), "--max-num-seq is not a flag", "Did you mean --max-num-seqs?"),
        (container(args=["--max-num-seqs=many"]), "--max-num-seqs is 'many'", "integer"),
        (container(args=["--max-num-seqs=0"]), "--max-num-seqs is 0", "from 1"),
        (container(args=["--max-num-seqs"]), "no value", "Give it one"),
        (container(args=["--seed=1", "surplus"]), "'surplus' is not a flag", "Remove"),
        (container(command=["/bin/sh", "-c"], args=["x"]), "'/bin/sh -c x'", "vllm serve"),
        (container(args=["--served-model-name={{ .Spec.Model.Name }}"]), "template", "Write the value"),
        (container(env=[{"name": "QUIRE_MAX_NUM_SEQ", "value": "1"}]), "QUIRE_MAX_NUM_SEQ", "QUIRE_MAX_NUM_SEQS"),
        (container(env=[{"name": "QUIRE_PORT", "value": "1"}]), "QUIRE_PORT", "Remove"),
        (container(env=[{"name": "VLLM_ADDITIONAL_ARGS", "value": "'"}]), "cannot be split", "quotes"),
        (container(env=[{"name": "A=B", "value": "1"}]), "'A=B'", "Leave"),
        (container(env=[{"name": "", "value": "1"}]), r"env\[0\].name is ''", "Leave"),
        (container(env=[{"name": "A\0", "value": "1"}]), "no variable", "Leave"),
        (container(env=[{"name": "A", "value": "a\0b"}]), "cannot be handed to a process", "NUL"),
        (container(args=["--chat-template=a\0b"]), "cannot be handed to a process", "NUL"),
        (service({"model": {"uri": "hf://--api-key=x"}}), "names no model", "hf://org/name"),
        (service({"model": {"uri": "hf://org/--x/y"}}), "names no model", "hf://org/name"),
        (service({"model": {"uri": "pvc://a\0b/c"}}), "cannot be handed to a process", "NUL"),
        (service({"model": {"uri": "hf://"}}), "names no model", "hf://org/name"),
        (service({"model": {"uri": "file://--x"}}), "another machine", "file:///"),
        (container(env=[{"name": "A", "value": 1}]), "Expected `str", "v1alpha2"),
        (container(resources={"limits": {"cpu": "two"}}), "limits.cpu is 'two'", "16Gi"),
        (service({"template": {"containers": [{"name": "a"}, {"name": "b"}]}}), "none called 'main'", "main"),
        (
            service({"router": {"scheduler": {"config": {"ref": {"name": "x", "key": "y"}}}}}),
            "not in the file",
            "inline",
        ),
    ],
)
def test_what_is_wrong_is_refused_with_what_to_do(read, document, message, remedy):
    with pytest.raises(ConfigError, match=message) as refused:
        read(document)
    assert remedy in str(refused.value)


def test_a_path_out_of_the_claims_is_refused(read, tmp_path):
    with pytest.raises(ConfigError, match=r"\.\."):
        read(service({"model": {"uri": "pvc://claim/../../etc"}}), pvc_dir=tmp_path)


@pytest.mark.parametrize("documents", [(), (MINIMAL, MINIMAL), (PICKER,)])
def test_a_file_describes_one_service(read, documents):
    with pytest.raises(ConfigError, match="LLMInferenceService"):
        read(*documents)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "[" * 5000,
        "x: " + "y" * (2 << 20),
        "!!python/object/apply:os.system [true]",
        "\x00",
        "a: 1\na: 2",
        "- 1",
        textwrap.dedent("""
            apiVersion: serving.kserve.io/v1alpha2
            kind: LLMInferenceService
            metadata: {name: svc}
            spec: {model: {uri: a}, model: {uri: b}}
        """),
    ],
    ids=["aliases", "depth", "size", "tag", "control", "duplicate", "list", "nested duplicate"],
)
def test_hostile_yaml_is_refused(tmp_path, text):
    file = tmp_path / "llm.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        read_manifest(file)


names = st.sampled_from(sorted(types.Spec.__struct_encode_fields__)) | st.text(max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=12,
)


@given(spec=json_values, metadata=json_values)
@settings(max_examples=100, deadline=None)
def test_anything_is_read_or_refused(tmp_path_factory, spec, metadata):
    file = tmp_path_factory.getbasetemp() / "anything.yaml"
    file.write_text(yaml.safe_dump(MINIMAL | {"spec": spec, "metadata": metadata}))
    with suppress(ConfigError):
        read_manifest(file)


# --- what changes -------------------------------------------------------------------------------------------


def test_a_diff_tells_what_a_change_takes_and_no_secret(read):
    before = read(container(args=["--seed=1", "--api-key=old"], env=[{"name": "A", "value": "1"}])).service
    after = read(
        service(
            {
                "replicas": 2,
                "template": {
                    "containers": [
                        {"name": "main", "args": ["--seed=2", "--api-key=new"], "env": [{"name": "A", "value": "2"}]}
                    ]
                },
            }
        )
    ).service
    told = [str(change) for change in diff(before, after)]
    assert "both.replicas: 1 -> 2; at once" in told
    assert "both.arguments: --seed=1 -> (nothing); replaces the replicas" in told
    assert "both.environment.A: set -> set; replaces the replicas" in told
    assert not any("old" in line or "new" in line for line in told)
    assert diff(before, before) == []
    assert [change.before for change in diff(None, after)] == [None]
