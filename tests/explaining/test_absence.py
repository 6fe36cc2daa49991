"""What stands for absent players, and that answers under one absence are never taken for another's."""

import asyncio
from typing import Any

import numpy as np
import pytest
from explaining_kit import WORDS, Generator, RuleBackend, explain, row_of, runs_of
from mllm_shap import AudioPart, ConversationSnapshot, ExplainRunner, Message, Role, Turn

from mllm_shapx.data.audio import decode, encode_wav
from mllm_shapx.explaining.absence import absence_policy
from mllm_shapx.explaining.coalitions import RowCoalitions
from mllm_shapx.explaining.sample import open_row, player_set
from mllm_shapx.explaining.settings import GameSettings, explain_config

ABSENCES: list[dict[str, Any]] = [
    {},
    {"absence": "pad"},
    {"absence": "pad", "absence_text": "<gap>"},
    {"absence": "neutral"},
    {"absence": "neutral", "absence_text": "x"},
]


@pytest.mark.parametrize("absence", ABSENCES, ids=str)
def test_each_absence_is_the_librarys(absence: dict[str, Any]) -> None:
    row = row_of(" ".join(WORDS[:3]), " ".join(WORDS[3:6]), row_index=1)
    for run in runs_of(
        {"explainer_type": "exact"}, {"explainer_type": "leverage", "linear": 1}, shap=absence
    ):
        config = explain_config(run, GameSettings(run.explainer_type, run.budget, run.seed_for(1)), 6)
        snapshot = open_row(row, run).snapshot
        theirs = asyncio.run(ExplainRunner(config, backend=RuleBackend()).explain(snapshot)).result
        assert explain(row, run).player_values() == pytest.approx(list(theirs.values), abs=1e-12)


def test_runs_that_differ_in_their_prompts_share_no_answers() -> None:
    others = [
        *ABSENCES,
        {"players": "sentences"},
        {"players": "messages"},
        {"keep": {"words": ["fox"]}},
        {"keep": {"roles": ["system"]}},
    ]
    runs = runs_of(
        *(
            {"explainer_type": "exact", "name": f"r{n}", "shap_override": each}
            for n, each in enumerate(others)
        )
    )
    assert len({run.generation_key for run in runs}) == len(others)
    assert len({run.cost_key for run in runs}) == len(others)


def test_the_keys_of_answers_stored_before_are_what_they_were() -> None:
    plain, every_word, said = runs_of(
        {"explainer_type": "exact"},
        {"explainer_type": "exact", "name": "all", "shap_override": {"token_filter": "none"}},
        {
            "explainer_type": "exact",
            "name": "said",
            "shap_override": {"absence": "delete", "players": "words", "value_function": "wer"},
        },
    )
    assert plain.generation_key == "9decfebc07cd34b5"
    assert every_word.generation_key == "203cdd9048be0bce"
    assert said.generation_key == plain.generation_key


def test_a_prompt_of_absent_words_holds_what_stands_for_them() -> None:
    texts = []
    for absence in ABSENCES:
        (run,) = runs_of({"explainer_type": "exact"}, shap=absence)
        texts.append(open_row(row_of("red fox jumps"), run).render(0b101).messages()[-1].text)
    assert texts == ["red jumps", "red [MASK] jumps", "red <gap> jumps", "red ___ jumps", "red xxx jumps"]


def spoken_row(absence: dict[str, Any]) -> RowCoalitions:
    """Return a prompt of two words and a recording of three windows under an absence."""
    (run,) = runs_of(
        {"explainer_type": "exact"},
        shap=absence,
        connector="liquid_audio",
        modality={"input_modality": "interleaved__text_first__male"},
        audio_segmentation={"window_ms": 100.0},
    )
    tone = np.random.default_rng(1).uniform(-0.5, 0.5, 4800).astype(np.float32)
    recording = AudioPart(encode_wav(tone, 16_000), 16_000)
    messages = (Message(role=Role.USER, text="red fox"), Message(role=Role.USER, content=(recording,)))
    snapshot = ConversationSnapshot.from_turns(tuple(Turn(messages=(message,)) for message in messages))
    return RowCoalitions(snapshot, player_set(snapshot, run), share_prompts=True, policy=absence_policy(run))


def heard(snapshot: ConversationSnapshot) -> np.ndarray:
    part = next(p for m in snapshot.messages() for p in m.content if isinstance(p, AudioPart))
    return np.asarray(decode(part.data())[0])


def said(snapshot: ConversationSnapshot) -> list[str]:
    return [message.text for message in snapshot.messages()][-2:]


@pytest.mark.parametrize(
    ("absence", "text"),
    [
        ({}, "red"),
        ({"audio_absence": "cut", "absence": "pad"}, "red [MASK]"),
        ({"absence": "pad"}, "red [MASK]"),
        ({"absence": "neutral"}, "red ___"),
        ({"audio_absence": "silence"}, "red"),
        ({"audio_absence": "noise"}, "red"),
    ],
    ids=str,
)
def test_absent_stretches_are_cut_silent_or_noise_not_written(absence: dict[str, Any], text: str) -> None:
    row = spoken_row(absence)
    assert row.players.num_players == 5
    whole = heard(row.render(0b11111))
    third = len(whole) // 3
    prompt = row.render(0b10101)  # without "fox" and without the second window
    assert said(prompt) == [text, ""], "nothing is written in the place of a stretch"
    found = heard(prompt)
    kind = absence.get("audio_absence") or ("silence" if "absence" in absence else "cut")
    if kind == "cut":
        assert found == pytest.approx(np.concatenate([whole[:third], whole[2 * third :]]), abs=1e-4)
        return
    assert len(found) == len(whole)
    assert found[:third] == pytest.approx(whole[:third], abs=1e-4)
    assert found[2 * third :] == pytest.approx(whole[2 * third :], abs=1e-4)
    middle, before = found[third : 2 * third], whole[third : 2 * third]
    if kind == "silence":
        assert not middle.any()
    else:
        assert np.sqrt(np.mean(middle**2)) == pytest.approx(np.sqrt(np.mean(before**2)), rel=0.1)
        assert abs(np.corrcoef(middle, before)[0, 1]) < 0.1
    assert row.render(0b10101).snapshot_id == prompt.snapshot_id, "rendered again it is the same prompt"
    assert spoken_row(absence).render(0b10101).snapshot_id == prompt.snapshot_id


def test_answers_of_one_absence_are_not_used_for_another() -> None:
    row = row_of(" ".join(WORDS[:4]))
    cut, padded = runs_of(
        {"explainer_type": "exact"},
        {"explainer_type": "exact", "name": "padded", "shap_override": {"absence": "pad"}},
    )
    generator = Generator()
    first, second = explain(row, cut, generator=generator), explain(row, padded, generator=generator)
    assert first.player_values() != second.player_values()
    assert (first.model_calls, second.model_calls) == (16, 16)
