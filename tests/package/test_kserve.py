"""The InferenceService, by KServe's own schema, and the image's build context."""

import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

import mnist_batchnorm
from mnist_batchnorm.cli import COMMANDS
from mnist_batchnorm.commands.serve import command as serve_command
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import MODELS, SERVED
from mnist_batchnorm.package.kserve import (
    DEPLOYMENT,
    IMAGE,
    LOCK,
    SERVING,
    require_image,
)
from mnist_batchnorm.package.requirements import closure
from mnist_batchnorm.package.templating import fill
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.process.supervisor import SHUTDOWN_GRACE_S
from tests.conftest import ROOT, MnistBn
from tests.package.conftest import PARITY, Package, change_parity

SCHEMA = ROOT / "tests/fixtures/kserve/inferenceservice.schema.json"
HEALTH = {"/v2/health/ready", "/v2/health/live"}
UNITS = {"Mi": 2**20, "Gi": 2**30}
SHELL = re.compile(r"^RUN (.*)$", re.MULTILINE)
OURS = {"mnist-batchnorm"}
QUEUE_PROXY = 30  # seconds for which Knative's proxy holds back a container's SIGTERM


def strict(schema: Any, *, of_properties: bool = False) -> Any:
    """Forbid fields that a schema does not know: the API server drops or refuses them."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {key: strict(part, of_properties=key == "properties") for key, part in schema.items()}
    if not of_properties and "properties" in schema:
        parts["additionalProperties"] = False
    return parts


@pytest.fixture(scope="module")
def validator() -> Any:
    import jsonschema_rs

    return jsonschema_rs.validator_for(strict(json.loads(SCHEMA.read_text())))


def manifest(folder: Path) -> Any:
    """The InferenceService."""
    return YAML(typ="safe").load(folder / "inferenceservice.yaml")


def container(folder: Path) -> Any:
    """Its only container."""
    (only,) = manifest(folder)["spec"]["predictor"]["containers"]
    return only


def dockerfile(folder: Path) -> list[list[str]]:
    """The instructions, each as its words."""
    lines = (folder / "Dockerfile").read_text().splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


def instruction(folder: Path, name: str) -> str:
    """What the last instruction of a name says."""
    return [" ".join(words[1:]) for words in dockerfile(folder) if words[0] == name][-1]


# --- the InferenceService -----------------------------------------------------------------------


def test_kserve_accepts_it(shared_package: Package, validator: Any) -> None:
    validator.validate({**manifest(shared_package("kserve")), "metadata": {}})


@pytest.mark.parametrize(
    "change",
    [
        {"canaryTrafficPercent": "10"},
        {"scaleMetrics": "concurrency"},
        {"containers": [{"image": "x", "ports": [{"containerPort": "8080"}]}]},
        {"containers": [{"image": "x", "livenessProbe": {"httpGet": {"path": "/"}}}]},
        {"containers": [{"image": "x", "securityContext": {"privileges": False}}]},
    ],
    ids=str,
)
def test_the_schema_refuses_wrong_fields(
    shared_package: Package, validator: Any, change: dict[str, object]
) -> None:
    content = manifest(shared_package("kserve"))
    content["spec"]["predictor"] |= change
    assert not validator.is_valid({**content, "metadata": {}})


def test_service_has_what_production_asks_for(package: Package) -> None:
    folder = package("kserve", "--canary", "25")
    content = manifest(folder)
    assert (content["apiVersion"], content["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    predictor = content["spec"]["predictor"]
    assert predictor["canaryTrafficPercent"] == 25
    assert 1 <= predictor["minReplicas"] < predictor["maxReplicas"]
    assert predictor["scaleMetric"] == "concurrency"
    assert predictor["automountServiceAccountToken"] is False
    only = container(folder)
    assert only["name"] == "kserve-container"  # by which KServe finds it
    assert {"name": "PROTOCOL", "value": "v2"} in only["env"]
    security = only["securityContext"]
    assert security["runAsNonRoot"] is security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}


def test_canary_is_10_percent_unless_told(shared_package: Package) -> None:
    assert manifest(shared_package("kserve"))["spec"]["predictor"]["canaryTrafficPercent"] == 10


def test_probes_ask_the_servers_health(shared_package: Package) -> None:
    only = container(shared_package("kserve"))
    (port,) = only["ports"]
    probes = {
        name: only[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")
    }
    assert {probe["path"] for probe in probes.values()} == HEALTH
    assert probes["liveness"]["path"] == "/v2/health/live"
    assert {probe["port"] for probe in probes.values()} == {port["containerPort"]}


def test_server_drains_once_the_probe_has_failed_and_before_it_is_killed(
    shared_package: Package,
) -> None:
    folder = shared_package("kserve")
    only, predictor = container(folder), manifest(folder)["spec"]["predictor"]
    options = serve_command.make_context("serve", list(only["args"])).params
    probe = only["readinessProbe"]
    noticed = probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
    assert options["drain_delay"] > noticed
    # Knative refuses terminationGracePeriodSeconds and takes the timeout for it
    assert "terminationGracePeriodSeconds" not in predictor
    drain = options["drain_delay"] + options["drain"]
    assert predictor["timeout"] > QUEUE_PROXY + drain + SHUTDOWN_GRACE_S


def test_memory_holds_the_largest_request_many_times(shared_package: Package) -> None:
    only = container(shared_package("kserve"))
    resources = only["resources"]
    sizes = {}
    for kind, values in resources.items():
        number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", values["memory"]).groups()  # type: ignore[union-attr]
        sizes[kind] = int(number) * UNITS[unit]
    assert Settings().max_body < sizes["requests"] < sizes["limits"]
    options = serve_command.make_context("serve", list(only["args"])).params
    assert sizes["limits"] > 5 * options["max_bodies"]  # measured: at most 3.4 times that
    assert resources["requests"]["cpu"] == resources["limits"]["cpu"]


# --- the image ----------------------------------------------------------------------------------


def test_service_runs_what_the_image_is(package: Package) -> None:
    folder = package("kserve", "--image", "registry.example.com:5000/team/mnist-bn:7")
    only = container(folder)
    assert only["image"] == "registry.example.com:5000/team/mnist-bn:7"
    assert f"docker build -t {only['image']} .\n" in (folder / "README.md").read_text()
    assert instruction(folder, "EXPOSE") == str(only["ports"][0]["containerPort"])
    user, group = instruction(folder, "USER").split(":")
    assert (int(user), int(group)) == (
        only["securityContext"]["runAsUser"],
        only["securityContext"]["runAsGroup"],
    )
    assert int(user) > 0


def test_image_is_named_after_version_and_hash(shared_package: Package) -> None:
    folder = shared_package("kserve")
    sha256 = json.loads((folder / "manifest.json").read_text())["models"]["mnist-bn"]["sha256"]
    assert container(folder)["image"] == f"mnist-bn:1-{sha256[:12]}"


def test_server_understands_its_command_line(shared_package: Package) -> None:
    folder = shared_package("kserve")
    start = json.loads(instruction(folder, "ENTRYPOINT"))
    assert start[:2] == ["mnist-bn", "serve"]
    assert start[1] in COMMANDS
    for words in (json.loads(instruction(folder, "CMD")), container(folder)["args"]):
        context = serve_command.make_context("serve", [*start[2:], *words])
        assert context.params["host"] == "0.0.0.0"
        assert context.params["port"] == int(instruction(folder, "EXPOSE"))
        assert dict(word.split("=") for word in context.params["sources"]) == {
            name: f"models/{file}" for name, file in SERVED.items()
        }


def test_token_comes_from_the_secret(shared_package: Package) -> None:
    folder = shared_package("kserve")
    only = container(folder)
    context = serve_command.make_context("serve", list(only["args"]))
    token = context.params["token_file"]
    (mount,) = [m for m in only["volumeMounts"] if Path(m["mountPath"]) == token.parent]
    assert mount["readOnly"] is True
    volumes = {v["name"]: v for v in manifest(folder)["spec"]["predictor"]["volumes"]}
    secret = volumes[mount["name"]]["secret"]["secretName"]
    readme = (folder / "README.md").read_text()
    assert f"kubectl create secret generic {secret} --from-file={token.name}\n" in readme
    assert {m["name"] for m in only["volumeMounts"]} == volumes.keys()


def test_evidence_travels_with_the_models(shared_package: Package) -> None:
    root = shared_package("kserve") / "rootfs"
    files = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    assert files == {
        *(MODELS / file for file in SERVED.values()),
        MODELS / "registry.json",
        PARITY,
    }
    for path in files:
        assert (root / path).read_bytes() == path.read_bytes()


def test_context_holds_what_is_copied_and_nothing_else(shared_package: Package) -> None:
    folder = shared_package("kserve")
    copied = {
        source
        for words in dockerfile(folder)
        if words[0] == "COPY" and not words[1].startswith("--from")
        for source in words[1:-1]
    }
    lines = (folder / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert allowed == copied
    assert all((folder / source).exists() for source in copied)


def test_code_is_this_package(shared_package: Package) -> None:
    def code(folder: Path) -> dict[str, bytes]:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    folder = shared_package("kserve") / "package/mnist_batchnorm"
    assert not [*folder.rglob("__pycache__")]
    assert code(folder) == code(Path(mnist_batchnorm.__file__).parent)


def test_every_download_has_a_hash(shared_package: Package) -> None:
    folder = shared_package("kserve")
    runs = SHELL.findall((folder / "Dockerfile").read_text())
    installs = [line for line in runs if "/pip " in line]
    for line in installs:
        words = shlex.split(line)
        if "-r" in words:
            assert "--require-hashes" in words
            assert words[words.index("--only-binary") + 1] == ":all:"
        else:
            assert "--no-deps" in words
            assert {"--no-build-isolation", "--no-index"} & {*words}
    assert len(installs) == 4
    for file in ("requirements.txt", "requirements-build.txt"):
        text = (folder / file).read_text()
        entries = re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]
        assert entries
        assert all("==" in entry and "--hash=sha256:" in entry for entry in entries)
        for entry in entries:
            assert entry.rstrip() in (ROOT / LOCK).read_text()


def test_server_imports_just_what_is_installed() -> None:
    tell = (
        "import sys; before = {*sys.modules}; import mnist_batchnorm.cli, "
        "mnist_batchnorm.commands.serve, mnist_batchnorm.serve.process.sources, "
        "mnist_batchnorm.serve.process.start, mnist_batchnorm.serve.process.worker; "
        "print(*sys.modules.keys() - before)"
    )
    done = subprocess.run([sys.executable, "-c", tell], check=True, capture_output=True, text=True)
    owners = packages_distributions()
    imported = {
        canonicalize_name(owner)
        for module in done.stdout.split()
        for owner in owners.get(module.partition(".")[0], [])
    }
    assert imported - OURS <= closure(SERVING)
    assert {*SERVING} - imported <= {"uvloop"}  # which uvicorn imports when it starts


# --- what comes from outside --------------------------------------------------------------------

COMPONENT = st.from_regex(r"\A[a-z0-9]{1,8}([._-][a-z0-9]{1,8}){0,2}\Z")
HOST = st.from_regex(r"\A[a-z0-9]{1,8}\.[a-z]{2,6}(:[0-9]{1,5})?\Z") | st.just("localhost:5000")
TAG = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}\Z")
SHA256 = st.from_regex(r"\A[0-9a-f]{64}\Z")


@st.composite
def references(draw: st.DrawFn) -> str:
    """References of images as the distribution project's grammar makes them."""
    host = draw(st.none() | HOST)
    name = "/".join(draw(st.lists(COMPONENT, min_size=1, max_size=3)))
    tag, digest = draw(st.none() | TAG), draw(st.none() | SHA256)
    return (
        (f"{host}/" if host else "")
        + name
        + (f":{tag}" if tag else "")
        + (f"@sha256:{digest}" if digest else "")
    )


@given(references())
def test_references_of_images_are_accepted(reference: str) -> None:
    assert require_image(reference) == reference


@pytest.mark.parametrize(
    "reference",
    [
        "",
        " ",
        "Upper",
        "a b",
        "a:b:c",
        "a//b",
        "/a",
        "a/",
        "-a",
        "a:",
        "a:-tag",
        "a@sha256:12",
        "http://example.com/a",
        "a\n",
        'a"\nprivileged: true',
        "a;reboot",
        "$(reboot)",
        "{{ token }}",
        "é",
        "a" * 401,
    ],
)
def test_other_references_are_an_error(reference: str) -> None:
    with pytest.raises(UserError, match="is no reference of a container image"):
        require_image(reference)


@given(st.text() | references())
def test_what_is_accepted_stays_one_yaml_string_and_one_shell_word(text: str) -> None:
    if not IMAGE.match(text):
        with pytest.raises(UserError):
            require_image(text)
        return
    values = {
        "image": text,
        "models": [],
        "sources": ["a=b"],
        "port": 1,
        "user": 1,
        "cpu": "1",
        "memory": {"request": "1Mi", "limit": "1Mi"},
        "replicas": {"minimum": 1, "maximum": 2},
        "concurrency": 1,
        "canary": 1,
        "readiness": DEPLOYMENT["readiness"],
        "stop": DEPLOYMENT["stop"],
    }
    service = YAML(typ="safe").load(fill("inferenceservice.yaml.j2", **values))
    assert service["spec"]["predictor"]["containers"][0]["image"] == text
    assert shlex.split(text) == [text]


# --- the lock -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("proven")
def test_another_onnx_runtime_than_proved_is_refused(mnist_bn: MnistBn) -> None:
    change_parity(lambda content: content["versions"].update(onnxruntime="1.23.0"))
    done = mnist_bn("package", "kserve", "out")
    assert done.status == 1
    assert done.err.startswith(
        "FAILED: nothing is packaged: the models were proved with ONNX Runtime 1.23.0, but "
        "requirements.lock has "
    )
    assert not Path("out").exists()


@pytest.mark.usefixtures("proven")
def test_lock_that_is_missing_or_lacks_a_package_is_refused(mnist_bn: MnistBn) -> None:
    text = LOCK.read_text()
    LOCK.write_text(re.sub(r"^uvicorn==", "uvicorn-x==", text, flags=re.MULTILINE))
    done = mnist_bn("package", "kserve", "out")
    assert (done.status, done.err) == (
        2,
        "error: requirements.lock lacks uvicorn; run `make lock`\n",
    )
    LOCK.unlink()
    done = mnist_bn("package", "kserve", "out")
    assert done.status == 2
    assert done.err.startswith("error: no requirements.lock in ")
    assert not Path("out").exists()


def test_distribution_that_is_not_installed_is_named() -> None:
    with pytest.raises(UserError, match="no-such-distribution is not installed"):
        closure(["no-such-distribution"])


def test_closure_follows_needs_but_not_extras() -> None:
    found = closure(["starlette"])
    assert {"starlette", "anyio", "idna"} <= found
    assert "httpx" not in found
    assert "itsdangerous" not in found
