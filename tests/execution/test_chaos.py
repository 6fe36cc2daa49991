"""The short form of scripts/chaos.py: everything is killed once, and nothing is lost."""

from pathlib import Path

import pytest
from chaos_kit import KILLS, run_chaos

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
