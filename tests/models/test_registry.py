"""Which model a config names: found out early, without loading anything."""

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.config.models import ConnectorKwargs, ExperimentSet
from mllm_shapx.errors import ModelError
from mllm_shapx.models.identity import directory_digest
from mllm_shapx.models.registry import check_connector, load_model, model_identity
from mllm_shapx.planning.sweep import expand

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run_of(model_id: str, revision: str | None = None, **options: Any) -> ModelSettings:
    """Return the run of a config that names `model_id`."""
    kwargs = ConnectorKwargs(model_id=model_id, revision=revision, **options)
    study = ExperimentSet.model_validate(
        {
            "experiment_set_id": "t",
            "connector": "hf_text",
            "device": "cpu",
            "connector_kwargs": kwargs.model_dump(),
            "generation": {"text_temperature": 0.0},
            "experiments": [{"explainer_type": "exact"}],
        }
    )
    return expand(study).runs[0].model_settings


@pytest.fixture
def model_files(tmp_path: Path) -> Path:
    """Return a directory with what a model needs, by name."""
    directory = tmp_path / "models" / "tiny"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    save_file({"weight": np.zeros(3)}, directory / "model.safetensors")
    return directory


def test_a_directory_is_found_beside_the_config_and_known_by_its_contents(
    model_files: Path, tmp_path: Path
) -> None:
    """The digest of names, sizes and contents stands for the revision; hidden caches do not count."""
    config = tmp_path / "study.json"
    found, digest = model_identity(run_of("models/tiny"), config)
    assert found == model_files
    assert digest == directory_digest(model_files)
    assert len(digest) == 64
    (model_files / ".cache").mkdir()
    (model_files / ".cache" / "x").write_text("x")
    assert model_identity(run_of("models/tiny"), config)[1] == digest
    save_file({"weight": np.ones(3)}, model_files / "model.safetensors")
    assert model_identity(run_of("models/tiny"), config)[1] != digest


@pytest.mark.parametrize(
    ("missing", "named"), [("config.json", "lack of config.json"), ("model.safetensors", "lack of weights")]
)
def test_a_directory_that_is_no_model_says_what_is_missing(
    model_files: Path, tmp_path: Path, missing: str, named: str
) -> None:
    """Before anything starts, the message names the directory, what it lacks and what a model holds."""
    (model_files / missing).unlink()
    with pytest.raises(ModelError, match=rf"models/tiny.*{named}.*a model directory holds config\.json"):
        model_identity(run_of("models/tiny"), tmp_path / "study.json")


@pytest.mark.parametrize("written", ["./models/none", "/no/such/model", "a/b/c", "~/none"])
def test_a_path_that_is_not_there_is_never_taken_for_a_hub_id(tmp_path: Path, written: str) -> None:
    """What looks like a path is refused without asking the hub."""
    with pytest.raises(ModelError, match="there is no directory"):
        model_identity(run_of(written), tmp_path / "study.json")


def test_a_file_is_not_a_model_directory(model_files: Path, tmp_path: Path) -> None:
    """Naming the weights' file asks for its directory."""
    with pytest.raises(ModelError, match="is a file; name the directory"):
        model_identity(run_of(str(model_files / "model.safetensors")), tmp_path / "study.json")


class _Hub(http.server.BaseHTTPRequestHandler):
    """Enough of the hub's API to ask for a model's commit."""

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/org/tiny"):
            if "revision/" in self.path and not self.path.split("revision/")[1].startswith(("main", COMMIT)):
                self._send(404, {"error": "no such revision"}, "RevisionNotFound")
            else:
                files = [{"rfilename": "config.json"}, {"rfilename": "model.safetensors"}]
                self._send(200, {"id": "org/tiny", "sha": COMMIT, "siblings": files})
        elif self.path.startswith("/api/models/org/notes"):
            self._send(200, {"id": "org/notes", "sha": COMMIT, "siblings": [{"rfilename": "README.md"}]})
        else:
            self._send(404, {"error": "no such repository"}, "RepoNotFound")

    def do_HEAD(self) -> None:
        self.send_error(404)

    def _send(self, status: int, data: Any, code: str = "") -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Serve a hub on loopback and point huggingface_hub to it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield endpoint
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_models_commit_is_asked_for_at_its_revision(hub: str, tmp_path: Path) -> None:
    """The commit behind a branch is what gets recorded; no directory comes with it."""
    assert hub
    assert model_identity(run_of("org/tiny", "main"), tmp_path / "s.json") == (None, COMMIT)
    assert model_identity(run_of("org/tiny", COMMIT), tmp_path / "s.json") == (None, COMMIT)


@pytest.mark.parametrize(
    ("model_id", "revision", "message"),
    [
        ("org/tiny", "v9", "no revision 'v9'"),
        ("org/missing", None, "is no directory here, and the hub has no such model, or it is private"),
        ("org/notes", None, "no config.json"),
    ],
)
def test_what_the_hub_does_not_have_is_said_early(
    hub: str, tmp_path: Path, model_id: str, revision: str | None, message: str
) -> None:
    """A wrong name or revision and a repository without a model are refused by name."""
    assert hub
    with pytest.raises(ModelError, match=message):
        model_identity(run_of(model_id, revision), tmp_path / "s.json")


def test_without_a_network_the_cache_answers_or_the_message_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An unreachable hub is no error when the commit is in the cache."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # the call changes both
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    with pytest.raises(ModelError, match=r"the hub at http://127\.0\.0\.1:9 cannot be reached"):
        model_identity(run_of("org/tiny"), tmp_path / "s.json")
    snapshot = cache / "models--org--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
    assert model_identity(run_of("org/tiny"), tmp_path / "s.json") == (None, COMMIT)


def test_a_connector_without_its_extra_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text-only installation that meets an audio config says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"pip install 'mllm-shapx\[audio\]'"):
        check_connector("liquid_audio")


def test_early_checks_import_neither_torch_nor_mllm_shap() -> None:
    """`validate` and `plan` call them and must answer at once."""
    code = (
        "import sys, mllm_shapx.models.registry, mllm_shapx.models.identity;"
        "print(sorted({'torch', 'transformers', 'mllm_shap', 'huggingface_hub'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_a_run_loads_its_model_with_its_settings(model_directory: Any, tmp_path: Path) -> None:
    """Dtype, batch size, name and revision arrive in the loaded model."""
    directory = model_directory("llama")
    run = run_of(str(directory), dtype="float32", batch_size=5)
    path, digest = model_identity(run, tmp_path / "s.json")
    model = load_model(run, path, digest)
    assert model.max_batch_size == 5
    identity = model.identity
    assert (identity.connector, identity.model_id, identity.revision) == ("hf_text", str(directory), digest)
    assert (identity.dtype, identity.device) == ("float32", "cpu")
