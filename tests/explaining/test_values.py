"""Value functions beside the similarities: named in the config, scored as mllm_shap scores them."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from explaining_kit import WORDS, Generator, RuleBackend, likelihood, no_embedding, row_of, runs_of
from mllm_shap import ConversationSnapshot, ExplainRunner
from mllm_shap.domain.generation import ForcedScore

from mllm_shapx.errors import ModelError
from mllm_shapx.explaining.sample import explain_run, open_row
from mllm_shapx.explaining.settings import GameSettings, explain_config
from mllm_shapx.models.base import Answer


class ForcingBackend(RuleBackend):
    """The rules, with likelihoods, as mllm_shap's backend."""

    forces_continuations = True

    async def score_continuations(
        self, snapshot: ConversationSnapshot, continuations: Sequence[str], top_k: int = 0
    ) -> tuple[ForcedScore, ...]:
        return tuple(likelihood(snapshot, text, top_k) for text in continuations)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wer", None),
        ("reference_wer", {"reference": "red fox tail1"}),
        ("tf_logprob", None),
        ("tf_logprob", {"reduce": "sum"}),
        ("tf_jsd", {"top_k": 3}),
        ("contrastive", {"target": "red fox", "foil": "old stone bridge"}),
    ],
)
@pytest.mark.parametrize("explainer", [{"explainer_type": "exact"}, {"explainer_type": "mc", "linear": [1]}])
def test_a_value_function_gives_the_librarys_values(
    name: str, options: dict[str, Any] | None, explainer: dict[str, Any]
) -> None:
    row = row_of(" ".join(WORDS[:6]), row_index=4)
    (run,) = runs_of(explainer, shap={"value_function": name, "value_options": options})
    coalitions = open_row(row, run)
    config = explain_config(run, GameSettings(run.explainer_type, run.budget, run.seed_for(4)), 6)
    theirs = asyncio.run(ExplainRunner(config, backend=ForcingBackend()).explain(coalitions.snapshot)).result
    generator = Generator()

    async def force(
        masks: Sequence[int], answers: Sequence[Answer], top_k: int
    ) -> list[tuple[ForcedScore, ...]]:
        return [
            tuple(likelihood(coalitions.render(mask), answer.text, top_k) for answer in answers)
            for mask in masks
        ]

    ours = asyncio.run(explain_run(row, coalitions, run, generator, no_embedding, force=force))
    assert ours.player_values() == pytest.approx(list(theirs.values), abs=1e-12)
    assert (ours.base_value, ours.grand_value) == pytest.approx((theirs.base_value, theirs.grand_value))
    if run.shap.reads == "likelihoods":
        assert generator.asked == [63], "only the whole prompt is answered"
        assert (ours.model_calls, ours.distinct_answers) == (1, None)
    else:
        assert ours.model_calls == ours.n_calls


def test_without_likelihoods_the_run_says_what_is_missing() -> None:
    row = row_of(" ".join(WORDS[:3]))
    (run,) = runs_of({"explainer_type": "exact"}, shap={"value_function": "tf_logprob"})
    with pytest.raises(ModelError, match="needs the likelihood of a given text"):
        asyncio.run(explain_run(row, open_row(row, run), run, Generator(), no_embedding))


def test_a_variant_names_a_similarity_or_a_value_function() -> None:
    plain, wer, back = runs_of(
        {"explainer_type": "exact", "name": "plain"},
        {"explainer_type": "exact", "name": "wer", "shap_override": {"value_function": "wer"}},
        {
            "explainer_type": "exact",
            "name": "back",
            "shap_override": {"similarity": "EuclideanSimilarity"},
        },
        shap={"value_function": "contrastive", "value_options": {"target": "a", "foil": "b"}},
    )
    assert plain.shap.value_options == {"target": "a", "foil": "b"}
    assert (wer.shap.value_function, wer.shap.value_options) == ("reference_wer", None)
    assert (back.shap.value_function, back.shap.needs_embeddings) == (None, True)


def test_a_run_with_a_similarity_keeps_the_settings_that_it_had_before_value_functions() -> None:
    (run,) = runs_of({"explainer_type": "exact"})
    assert run.result_settings["shap"].keys() == {
        "mode", "similarity", "reducer", "normalizer", "allow_mask_duplicates", "token_filter",
    }  # fmt: skip
    (other,) = runs_of({"explainer_type": "exact"}, shap={"value_function": "wer"})
    assert "similarity" not in other.result_settings["shap"]
    assert run.generation_key == other.generation_key, "answers are shared whatever scores them"
