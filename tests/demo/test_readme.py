"""What the README shows is true."""

import json
import re
from pathlib import Path

from mllm_shapx.config.loading import load_config
from mllm_shapx.planning.sweep import expand

ROOT = Path(__file__).resolve().parents[2]


def test_config_shown_can_be_used_as_it_stands(tmp_path: Path) -> None:
    """A reader who copies the config gets a study, with the run names that the text tells."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```json\n(.*?)```", readme, flags=re.DOTALL)
    path = tmp_path / "study.json"
    path.write_text(block)
    config = load_config(path)
    assert config.warnings == ()
    assert config.experiment_set.experiment_set_id == json.loads(block)["experiment_set_id"]
    names = {run.name for run in expand(config.experiment_set).runs}
    assert {"exact", "limited_mc_frac0_1", "limited_mc_frac0_3"} <= names


def test_files_and_targets_named_are_there() -> None:
    """No link of the README leads nowhere."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:configs|scripts|demo|demo_smollm2)/[\w./]+)`", readme):
        assert (ROOT / name).exists(), name
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", readme, flags=re.MULTILINE)) <= set(targets)
