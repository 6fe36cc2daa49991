"""A result directory whose rows had other players: nothing of it is reused for the wrong coalitions."""

import json
from pathlib import Path

import pytest
from small_study import Study

from mllm_shapx.data import tokens


def players(study: Study, row: int) -> int:
    sample = json.loads((study.output / f"exact/samples/sample_{row:05d}_result.json").read_text())
    return int(sample["num_players"])


def test_samples_and_answers_of_other_players_are_not_mixed_with_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path, settings={"experiments": [{"explainer_type": "exact"}]})
    study.write_prompts("tell us — the harbor", "tell us about the harbor")
    with monkeypatch.context() as before:
        # The rule of earlier versions, under which the dash is a player.
        before.setattr(tokens, "_is_player", lambda word: bool(word.strip(".,!?;:")))
        assert study.call("--inline").code == 0
        assert (players(study, 0), players(study, 1)) == (5, 5)
    refused = study.call("--inline", "--resume")
    assert refused.code == 2
    assert "  - exact: 1 sample(s)" in refused.out
    assert "other players now" in refused.out
    assert (players(study, 0), players(study, 1)) == (5, 5), "nothing was touched"

    again = study.call("--inline", "--overwrite", "--json")
    assert again.code == 0, again.out
    assert '"model_calls": 16' in again.out, "of the changed row; the other one's answers are taken again"
    assert (players(study, 0), players(study, 1)) == (4, 5)
    assert "it has 5 players, not 4" in again.out
    assert study.call("--again", "100", verb="verify").code == 0
    assert study.call("--inline", "--resume").code == 0
    assert len(list((study.output / "exact").glob("set_aside_*/samples/*.json"))) == 2


def test_stored_answers_to_other_players_are_not_rescored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from mllm_shapx.cli import main

    study = Study(tmp_path, settings={"experiments": [{"explainer_type": "exact"}]})
    study.write_prompts("tell us — the harbor")
    with monkeypatch.context() as before:
        before.setattr(tokens, "_is_player", lambda word: bool(word.strip(".,!?;:")))
        assert study.call("--inline").code == 0
    found = CliRunner().invoke(main, ["rescore", "--config", str(study.config), "--overwrite"])
    assert found.exit_code == 2
    assert "16 coalition(s) of 1 row(s) are not stored" in found.output
