"""What is stored is never asked for again: through the command line, on the demo's model."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mllm_shapx.cli import main

ROOT = Path(__file__).parents[2]

EXACT = {"explainer_type": "exact"}
COSINE = {"explainer_type": "exact", "name": "cos", "shap_override": {"similarity": "CosineSimilarity"}}
EUCLIDEAN = {"explainer_type": "exact", "name": "euc", "shap_override": {"similarity": "EuclideanSimilarity"}}
IDENTITY = {"explainer_type": "exact", "name": "id", "shap_override": {"normalizer": "IdentityNormalizer"}}
SAMPLING = {"explainer_type": "limited_mc", "fractions": [0.2, 0.5]}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Study":
    monkeypatch.chdir(ROOT)
    return Study(tmp_path)


class Study:
    """A small study whose experiments can be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "out" / "small"

    def config(self, *experiments: dict[str, Any]) -> str:
        path = self.folder / "config.json"
        content = {
            "base": str(ROOT / "configs/demo.json"),
            "experiment_set_id": "small",
            "output_root": str(self.folder / "out"),
            "selection": {"filters": [{"column": "token_count", "op": "<=", "value": 6}], "max_samples": 2},
            "experiments": list(experiments),
        }
        path.write_text(json.dumps(content))
        return str(path)

    def call(self, command: str, *experiments: dict[str, Any], **options: bool) -> Result:
        flags = [f"--{name}" for name, given in options.items() if given]
        return CliRunner().invoke(main, [command, "--config", self.config(*experiments), *flags])

    def sample(self, run: str) -> dict[str, Any]:
        (path, *_) = sorted((self.output / run / "samples").iterdir())
        data: dict[str, Any] = json.loads(path.read_text())
        return data


def model_calls(result: Result) -> int:
    assert result.exit_code == 0, result.output
    outcome = json.loads(result.stdout.splitlines()[-1])
    return int(outcome["model_calls"])


def test_runs_added_to_a_config_ask_the_model_for_nothing_that_is_stored(study: Study) -> None:
    first = model_calls(study.call("run", EXACT, inline=True, json=True))
    assert first == 2 * 2**6
    added = study.call("run", EXACT, SAMPLING, COSINE, IDENTITY, inline=True, json=True, resume=True)
    assert model_calls(added) == 0
    assert study.sample("cos")["model_calls"] == 0
    assert study.sample("exact")["model_calls"] == 2**6


def test_rescoring_needs_no_model_and_refuses_with_what_is_missing(study: Study) -> None:
    model_calls(study.call("run", SAMPLING, COSINE, inline=True, json=True))
    before = study.sample("cos")["conversation"]
    again = study.call("rescore", SAMPLING, COSINE, overwrite=True)
    assert again.exit_code == 0, again.output
    assert study.sample("cos")["conversation"] == before
    euclidean = study.call("rescore", SAMPLING, COSINE, EUCLIDEAN)
    assert euclidean.exit_code == 0, "the vectors of the cosine run serve the Euclidean one too"

    other = {"explainer_type": "exact", "name": "max", "shap_override": {
        "similarity": "CosineSimilarity", "reducer": "MaxReducer"}}  # fmt: skip
    refused = study.call("rescore", SAMPLING, COSINE, EUCLIDEAN, other)
    assert refused.exit_code == 2
    assert "vector(s) of 2 row(s) are not stored" in refused.output
    assert not (study.output / "max").exists()


def test_rescoring_counts_missing_coalitions_before_it_touches_anything(study: Study) -> None:
    model_calls(
        study.call("run", {"explainer_type": "limited_mc", "num_samples": [-1]}, inline=True, json=True)
    )
    refused = study.call("rescore", {"explainer_type": "limited_mc", "num_samples": [-1]}, EXACT)
    assert refused.exit_code == 2
    stored = 6 + 2
    assert f"{2 * (2**6 - stored)} coalition(s) of 2 row(s) are not stored" in refused.output
    assert not (study.output / "exact").exists()


def test_the_store_is_described_and_pruned_of_what_no_run_needs(study: Study) -> None:
    longer = {"explainer_type": "exact", "name": "longer", "generation_override": {"max_new_tokens": 3}}
    model_calls(study.call("run", EXACT, longer, inline=True, json=True))
    info = CliRunner().invoke(main, ["store", "info", str(study.output), "--json"])
    keys = json.loads(info.stdout)["keys"]
    assert [key["answers"] for key in keys] == [128, 128]
    pruned = CliRunner().invoke(main, ["store", "prune", "--config", study.config(EXACT)])
    assert "removed the answers of 2 row(s)" in pruned.output
    left = json.loads(CliRunner().invoke(main, ["store", "info", str(study.output), "--json"]).stdout)["keys"]
    assert [key["settings"]["generation"]["max_new_tokens"] for key in left] == [10]


@pytest.mark.usefixtures("study")
def test_answers_to_another_conversation_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = tmp_path / "rows.parquet"

    def write(prompt: str) -> None:
        pq.write_table(pa.table({"prompt": [prompt]}), rows)

    config = tmp_path / "changed.json"
    config.write_text(json.dumps({
        "base": str(ROOT / "configs/demo.json"), "experiment_set_id": "changed",
        "output_root": str(tmp_path / "out"), "dataset": {"source": "local_parquet", "path": str(rows)},
        "experiments": [EXACT],
    }))  # fmt: skip
    write("tell us about the harbor")
    call = ["run", "--config", str(config), "--inline", "--json"]
    assert json.loads(CliRunner().invoke(main, call).stdout.splitlines()[-1])["model_calls"] == 32
    write("tell me about the museum")
    again = CliRunner().invoke(main, [*call, "--overwrite"])
    events = [json.loads(line) for line in again.stdout.splitlines()]
    assert events[-1]["model_calls"] == 32
    assert any("another conversation" in event.get("text", "") for event in events)
