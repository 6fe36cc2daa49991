"""The batch script: the repository's own files, what is refused, and what each option does to it."""

import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_study import ROOT, Study

from mllm_shapx.cli import main

SHIPPED = {
    "one_node.sbatch": "--cpus-per-node 2",
    "many_nodes.sbatch": "--cpus-per-node 2 --nodes 2 --run-options '--num-workers 2'",
    "array.sbatch": "--cpus-per-node 2 --array 3",
}
"""Script in slurm/ -> the options that print it, beside those that all have."""
COMMON = "--config configs/demo.json --time 01:00:00 --venv .venv"


def printed(*words: str) -> str:
    found = CliRunner().invoke(main, ["slurm", *words])
    assert found.exit_code == 0, found.output
    return found.output


def refused(*words: str) -> str:
    found = CliRunner().invoke(main, ["slurm", *words])
    assert found.exit_code == 2, found.output
    return " ".join(found.output.split())


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_the_shipped_scripts_are_what_the_command_prints(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To renew one: mllm-shapx slurm COMMON OPTIONS > slurm/NAME."""
    monkeypatch.chdir(ROOT)
    text = printed(*shlex.split(f"{COMMON} {SHIPPED[name]}"))
    assert text == (ROOT / "slurm" / name).read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(Study(tmp_path / "it is mine").config)


def test_every_option_reaches_the_script(config: str) -> None:
    text = printed(
        *("--config", config, "--time", "2-00:00:00", "--nodes", "4", "--gpus-per-node", "8"),
        *("--drain-before", "300", "--module", "cuda/12.4", "--module", "gcc", "--venv", "/opt/my env"),
        *(
            "--setup",
            "site.sh",
            "--job-name",
            "night",
            "--sbatch",
            "--partition=gpu",
            "--sbatch",
            "--exclusive",
        ),
        *("--sbatch", "--comment=two words", "--run-options", "--workers-per-gpu 2 --grace 5"),
    )
    for line in (
        "#SBATCH --job-name=night",
        "#SBATCH --nodes=4",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=32",
        "#SBATCH --time=2-00:00:00",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --requeue",
        "#SBATCH --partition=gpu",
        "#SBATCH --exclusive",
        '#SBATCH --comment="two words"',
        "module load cuda/12.4",
        "module load gcc",
        ". '/opt/my env/bin/activate' || exit",
        ". site.sh || exit",
        f"study=(mllm-shapx run --config '{config}' --resume --workers-per-gpu 2 --grace 5)",
    ):
        assert line in text.splitlines()


def test_the_grace_period_is_shorter_than_slurms_killwait(config: str) -> None:
    assert "--resume --grace 15)" in printed("--config", config, "--time", "60")


def test_what_slurm_or_run_would_refuse_is_refused_at_once(config: str) -> None:
    always = ("--config", config, "--time", "60")
    assert "--time 'soon' is no time limit; give minutes" in refused("--config", config, "--time", "soon")
    assert "--sbatch 'partition=gpu' is no option of sbatch" in refused(*always, "--sbatch", "partition=gpu")
    assert "is no option of sbatch" in refused(*always, "--sbatch", "--comment=a\nrm -rf b")
    assert "--run-options '--worker 2': No such option" in refused(*always, "--run-options", "--worker 2")
    assert "--overwrite cannot be given here" in refused(*always, "--run-options", "--overwrite")
    assert "--shard-index cannot be given here" in refused(*always, "--run-options", "--shard-index 1")
    inline = refused(*always, "--nodes", "2", "--run-options", "--inline")
    assert "--inline uses one node only; leave it out, or give --nodes 1" in inline
    assert "--job-name 'a b' " in refused(*always, "--job-name", "a b")
    assert "experiments" in refused("--config", str(broken(Path(config))), "--time", "60")


def broken(config: Path) -> Path:
    file = config.with_name("broken.json")
    file.write_text('{"experiment_set_id": "x"}')
    return file


def test_submit_without_slurm_says_so(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    said = refused("--config", config, "--time", "60", "--submit")
    assert "there is no sbatch on this machine" in said
