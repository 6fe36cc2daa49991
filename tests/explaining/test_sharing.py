"""An answer is generated once, whoever needs it, and the books say for whom."""

from explaining_kit import WORDS, Generator, explain, row_of, runs_of

from mllm_shapx.explaining.coalitions import REUSED
from mllm_shapx.explaining.sample import open_row

GRID = (
    {"explainer_type": "exact"},
    {"explainer_type": "limited_mc", "fractions": [0.1, 0.5]},
    {"explainer_type": "standard_cc", "fractions": [0.2, 0.9]},
    {"explainer_type": "limited_neyman", "fractions": [0.5]},
)


def test_sampling_runs_beside_an_exact_one_ask_the_model_nothing() -> None:
    row, runs = row_of(" ".join(WORDS[:8])), runs_of(*GRID)
    coalitions, generator = open_row(row, runs[0]), Generator()
    samples = [explain(row, run, coalitions, generator) for run in runs]
    assert len(generator.asked) == len(set(generator.asked)) == 2**8
    assert [sample.model_calls for sample in samples] == [256, 0, 0, 0, 0, 0]


def test_sharing_changes_no_value() -> None:
    row, runs = row_of(" ".join(WORDS[:7])), runs_of(*GRID)
    coalitions = open_row(row, runs[0])
    for run in runs:
        assert explain(row, run, coalitions).player_values() == explain(row, run).player_values()


def test_a_similarity_that_is_added_later_costs_no_model_call() -> None:
    row = row_of(" ".join(WORDS[:6]))
    first, second = runs_of(
        {"explainer_type": "exact"},
        {
            "explainer_type": "exact",
            "name": "identity",
            "shap_override": {"normalizer": "IdentityNormalizer"},
        },
    )
    coalitions = open_row(row, first)
    explain(row, first, coalitions)
    generator = Generator()
    resumed = open_row(row, second)
    resumed.know(coalitions.stored)
    assert explain(row, second, resumed, generator).model_calls == 0
    assert generator.asked == []


def test_a_sample_that_is_resumed_in_its_middle_counts_as_if_it_had_not_been() -> None:
    row = row_of(" ".join(WORDS[:6]))
    (run,) = runs_of({"explainer_type": "exact"})
    whole = open_row(row, run)
    undisturbed = explain(row, run, whole)
    half = dict(list(whole.stored.items())[:20])
    generator = Generator()
    coalitions = open_row(row, run)
    coalitions.know(half)
    resumed = explain(row, run, coalitions, generator)
    assert len(generator.asked) == 2**6 - 20
    assert resumed.model_calls == undisturbed.model_calls
    assert resumed.player_values() == undisturbed.player_values()


def test_coalitions_that_give_one_prompt_are_asked_once_when_greedy() -> None:
    row = row_of("go go go stop")
    (run,) = runs_of({"explainer_type": "exact"})
    coalitions, generator = open_row(row, run), Generator()
    sample = explain(row, run, coalitions, generator)
    # 0..3 times `go`, with and without `stop`.
    assert len(generator.asked) == 8
    assert (sample.n_calls, sample.model_calls) == (16, 8)
    assert sum(stored.asked_by == REUSED for stored in coalitions.stored.values()) == 8


def test_sampled_answers_are_not_shared_between_coalitions_of_one_prompt() -> None:
    row = row_of("go go go stop")
    (run,) = runs_of({"explainer_type": "exact"}, generation={"text_temperature": 0.7})
    generator = Generator()
    explain(row, run, generator=generator)
    assert len(generator.asked) == 16


def test_with_a_temperature_runs_have_generation_keys_of_their_own_unless_the_config_asks() -> None:
    experiments = ({"explainer_type": "exact"}, {"explainer_type": "limited_mc", "fractions": [0.5]})
    apart = runs_of(*experiments, generation={"text_temperature": 0.7})
    together = runs_of(*experiments, generation={"text_temperature": 0.7, "reuse_sampled_answers": True})
    assert len({run.generation_key for run in apart}) == 2
    assert len({run.generation_key for run in together}) == 1


def test_take_fresh_gives_each_answer_once() -> None:
    row = row_of("one two")
    (run,) = runs_of({"explainer_type": "exact"})
    coalitions = open_row(row, run)
    explain(row, run, coalitions)
    assert len(coalitions.take_fresh()) == 4
    assert coalitions.take_fresh() == {}
