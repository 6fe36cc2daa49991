"""Rows in which every coalition has the same answer are told of: by the run, the summary and `verify`."""

import json
from pathlib import Path

from small_study import Study


def test_rows_without_any_effect_are_counted_where_the_study_ends_and_where_it_is_checked(
    tmp_path: Path,
) -> None:
    settings = {
        "experiments": [{"explainer_type": "exact"}, {"num_samples": [-1]}],
        "generation": {"max_new_tokens": 4, "text_temperature": 0.0},
    }
    study = Study(tmp_path, settings=settings)
    study.write_prompts("about the", "my", "tell us about the harbor")
    ended = study.call("--inline")
    assert ended.code == 0, ended.out
    assert "warning: in 4 of 6 sample(s) every coalition has the same answer" in ended.out
    for run in ("exact", "limited_mc_ns-1"):
        summary = json.loads((study.output / run / "summary/aggregate_metrics.json").read_text())
        assert (summary["n_samples"], summary["n_constant"]) == (3, 2)
        samples = [
            json.loads(path.read_text()) for path in sorted((study.output / run / "samples").iterdir())
        ]
        assert [sample["distinct_answers"] == 1 for sample in samples] == [True, True, False]
        assert samples[2]["distinct_answers"] <= samples[2]["n_calls"]
    checked = study.call(verb="verify")
    assert checked.code == 0, "it may be true of a sound model"
    assert "exact: in 2 of 3 sample(s) every coalition has the same answer" in checked.out
    assert checked.out.endswith("all sound, 2 warning(s)\n")
    assert len(json.loads(study.call("--json", verb="verify").out)["warnings"]) == 2
