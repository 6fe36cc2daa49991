"""The short form of scripts/chaos.py: everything is killed once, and nothing is lost."""

import signal
from pathlib import Path

import pytest
from chaos_kit import KILLS, WANDB, run_chaos
from faults import BadDisk, Failure, has_compiler
from small_study import Sabotage, Study, results
from wandb_files import check_history

SEED = 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_survives_the_death_of_all_its_parts(tmp_path: Path) -> None:
    """SIGKILL to a worker, the coordinator, the aggregator, a second node's raylet and the driver."""
    figures = run_chaos(
        tmp_path, seed=SEED, blows=len(KILLS), kinds=KILLS, rows=200, words=5, longest_delay_s=1.0
    )
    assert [figures.count(kind) for kind in KILLS] == [1] * len(KILLS)
    assert figures.samples == figures.logged == 3 * 200
    assert figures.driver_starts == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not has_compiler(), reason="needs a C compiler")
def test_killed_with_a_full_disk_and_a_broken_one_nothing_is_missing(tmp_path: Path) -> None:
    """Ended three times in its middle, a study and its W&B history hold every sample once at the end."""
    undisturbed = Study(tmp_path / "undisturbed", rows=8)
    assert undisturbed.call("--inline").code == 0
    study = Study(tmp_path / "disturbed", rows=8, settings={"wandb": WANDB})
    disk, slow = BadDisk(tmp_path, study.output), Sabotage(tmp_path)
    slow.set(batch_s=0.5)
    study.env = {**disk.env, **slow.env}
    written: dict[Path, int] = {}
    ends: list[tuple[int, Failure | None]] = [(-signal.SIGKILL, None), (1, "w"), (1, "f")]
    for end, what in ends:
        process = study.start("--inline", "--resume")
        enough = len(written) + 3
        process.wait_for(lambda enough=enough: study.samples_on_disk() >= enough, 400)  # type: ignore[misc]
        process.kill() if what is None else disk.fail(what)
        found = process.wait(400)
        disk.mend()
        assert found.code == end, found.out
        assert what is None or BadDisk.ERRORS[what] in found.out
        files = {path: path.stat().st_mtime_ns for path in study.output.glob("*/samples/*.json")}
        assert written.items() <= files.items()
        written = files
    assert study.call("--inline", "--resume").code == 0
    assert study.call(verb="verify").code == 0
    assert results(study.output) == results(undisturbed.output)
    assert check_history(study.output, set()) == 3 * 8
