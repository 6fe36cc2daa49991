"""Batched LFM2-Audio generation against the package's own generators, one chat at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from liquid_kit import (
    chat,
    model,
    our_answers,
    package,
    package_answer,
    package_chat,
    random_chat,
    sound,
    spoken,
    wav,
    written,
)

from mllm_shapx.models.base import Answer, Decoding, EmbeddingMode

GREEDY = Decoding(max_new_tokens=10)
INTERLEAVED = Decoding(max_new_tokens=16, output_modality="audio")
SAMPLED = Decoding(
    max_new_tokens=12,
    text_temperature=0.9,
    text_top_k=40,
    audio_temperature=1.1,
    audio_top_k=30,
    output_modality="audio",
)


def test_prompts_are_the_packages_chat_states() -> None:
    """Token ids, feature lengths and features of a chat equal those of the package's ChatState."""
    for seed in range(12):
        snapshot = random_chat(seed)
        prompt, state = model().encode(snapshot, GREEDY), package_chat(snapshot)
        spaces = {
            position
            for start, recording in prompt.recordings
            for position in range(start, start + recording.positions)
        }
        text = [token for index, token in enumerate(prompt.token_ids) if index not in spaces]
        assert text == state.text[0].tolist()
        assert prompt.length == state.modality_flag.shape[1]
        features = [recording.features for _, recording in prompt.recordings]
        assert [each.shape[1] for each in features] == state.audio_in_lens.tolist()
        if features:
            torch.testing.assert_close(torch.cat(features, dim=1), state.audio_in, rtol=0, atol=0)


def test_text_answers_equal_the_packages_over_100_chats() -> None:
    """100 random chats, batched by 16: token for token what `generate_sequential` gives each alone."""
    chats = [random_chat(seed) for seed in range(100)]
    expected = [package_answer(snapshot, GREEDY) for snapshot in chats]
    assert our_answers(chats, GREEDY, batch_size=16) == expected
    lengths = {len(steps) for steps in expected}
    assert len(lengths) > 3, "the sequences should end at different times"
    assert any(isinstance(step, tuple) for steps in expected for step in steps), "some should open audio"


def test_interleaved_answers_equal_the_packages_over_30_chats() -> None:
    """30 random chats in one batch: tokens and audio frames are those of `generate_interleaved`."""
    chats = [random_chat(seed) for seed in range(200, 230)]
    expected = [package_answer(snapshot, INTERLEAVED) for snapshot in chats]
    assert our_answers(chats, INTERLEAVED, batch_size=30) == expected
    frames = [step for steps in expected for step in steps if isinstance(step, tuple)]
    assert len(frames) > 100
    assert any(frame[0] == 2048 for frame in frames), "some stretches of audio should end"


@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_sampled_answers_hang_on_their_seed_alone(batch_size: int) -> None:
    """A sampled answer is the same alone, in a batch of 3 and in a batch of 12, and in any order."""
    chats = [random_chat(seed) for seed in range(300, 312)]
    seeds = [7 * index + 1 for index in range(12)]
    found = our_answers(chats, SAMPLED, batch_size, seeds)
    backwards = our_answers(chats[::-1], SAMPLED, 5, seeds[::-1])
    assert backwards[::-1] == found
    assert our_answers(chats, SAMPLED, 12, [seed + 1 for seed in seeds]) != found


def test_sampling_respects_top_k() -> None:
    """With top-k every sampled first token is among the k most probable ones, and more than one occurs."""
    snapshot = random_chat(5)
    own, _ = package()
    with torch.no_grad():
        state = own.lfm(inputs_embeds=own._prefill(**package_chat(snapshot))).last_hidden_state[0, -1]
        best = set((state @ own.lfm.embed_tokens.weight.T).topk(4).indices.tolist())
    decoding = Decoding(max_new_tokens=1, text_temperature=20.0, text_top_k=4)
    first = {steps[0] for steps in our_answers([snapshot] * 64, decoding, 64, list(range(64)))}
    assert len(first) > 1
    assert first <= best


def test_top_k_of_one_is_greedy() -> None:
    """top_k 1 decodes greedily whatever the temperature, as in the package."""
    chats = [random_chat(seed) for seed in range(6)]
    decoding = Decoding(max_new_tokens=8, text_temperature=2.0, text_top_k=1)
    assert our_answers(chats, decoding, 6) == our_answers(chats, Decoding(max_new_tokens=8), 6)


def test_logprobs_are_those_of_the_plain_distribution() -> None:
    """Each text token carries the log-probability that the package's logits give it."""
    own, _ = package()
    snapshot = random_chat(11)
    decoding = Decoding(max_new_tokens=1, logprobs=True)
    (answer,) = model().answer([model().encode(snapshot, decoding)], decoding, [0])
    with torch.no_grad():
        inputs = own._prefill(**package_chat(snapshot))
        state = own.lfm(inputs_embeds=inputs).last_hidden_state[0, -1]
        expected = (state @ own.lfm.embed_tokens.weight.T).log_softmax(0)[answer.token_ids[0]]
    assert answer.logprobs == pytest.approx([expected.item()], abs=1e-4)


def test_a_recording_without_samples_is_left_out() -> None:
    """A message whose audio was cut away altogether is an empty turn, not a crash."""
    prompt = model().encode(chat(spoken(wav([]))), GREEDY)
    empty = model().encode(chat(written("")), GREEDY)
    assert prompt.token_ids == empty.token_ids
    assert not prompt.recordings


@pytest.mark.parametrize("samples", [1, 100, 319, 321, 1279])
def test_very_short_and_silent_recordings_give_finite_answers(samples: int) -> None:
    """Recordings down to one sample, and digital silence, go through encoder and decoder."""
    rng = np.random.default_rng(0)
    chats = [chat(spoken(wav(rng.uniform(-1, 1, samples)))), chat(spoken(wav(np.zeros(samples))))]
    decoding = Decoding(max_new_tokens=3, logprobs=True)
    prompts = [model().encode(snapshot, decoding) for snapshot in chats]
    for answer in model().answer(prompts, decoding, [0, 0]):
        assert answer.logprobs is not None
        assert np.isfinite(answer.logprobs).all()


def test_equal_recordings_are_encoded_once() -> None:
    """A recording that many coalitions share goes through the encoder once, in a batch and across batches."""
    rng = np.random.default_rng(99)
    shared = spoken(wav(sound(rng, 0.7)))
    chats = [chat(shared, written(" ".join(["word"] * count))) for count in range(6)]
    before = model().embedder.recordings_encoded
    our_answers(chats, Decoding(max_new_tokens=2), batch_size=3)
    assert model().embedder.recordings_encoded == before + 1


def test_the_answer_begins_after_the_prefill() -> None:
    """The prefill is part of the prompt and not of the answer."""
    snapshot = random_chat(1)
    given = Decoding(max_new_tokens=4, assistant_prefill="I hear")
    plain = model().encode(snapshot, GREEDY)
    prefilled = model().encode(snapshot, given)
    assert prefilled.token_ids[: plain.length] == plain.token_ids
    assert prefilled.length > plain.length
    assert not model().answer([prefilled], given, [0])[0].text.startswith("I hear")


@pytest.mark.parametrize("mode", ["STATIC", "CONTEXTUAL"])
@pytest.mark.parametrize(
    "reducer", ["MeanReducer", "MaxReducer", "MinReducer", "SumReducer", "FirstReducer", "ZeroReducer"]
)
def test_embeddings_of_answers_do_not_hang_on_their_batch(mode: EmbeddingMode, reducer: str) -> None:
    """Every reducer and mode gives an answer the same vector alone and beside others; none for no tokens."""
    answers = [
        Answer("a", token_ids=(40, 41, 42)),
        Answer(""),
        Answer("b", token_ids=(99,), audio_frames=((1, 2, 3, 4, 5, 6, 7, 8), (9,) * 8)),
    ]
    together = model().embed(answers, mode, reducer)
    for answer, vector in zip(answers, together, strict=True):
        (alone,) = model().embed([answer], mode, reducer)
        np.testing.assert_allclose(alone, vector, atol=1e-5)
    assert together[1].size == 0
    assert together[0].size == (3 * 64 if reducer == "ZeroReducer" else 64)


def test_static_embeddings_are_the_models_input_table() -> None:
    """STATIC with the mean is the mean of the rows of the token table."""
    own, _ = package()
    (vector,) = model().embed([Answer("x", token_ids=(50, 60))], "STATIC", "MeanReducer")
    expected = own.lfm.embed_tokens.weight[[50, 60]].mean(0).detach().numpy()
    np.testing.assert_allclose(vector, expected, atol=1e-6)


def test_likelihoods_equal_a_pass_over_each_chat_alone() -> None:
    """Spoken and written chats in one batch; the reference begins with the package's own prefill."""
    chats = [random_chat(seed) for seed in range(500, 516)]
    texts = ["hear", "tell me what you hear now", "Źdźbło in this recording"]
    given = [model().tokens_of(texts[place % 3]) for place in range(len(chats))]
    prompts = [model().encode(snapshot, GREEDY) for snapshot in chats]
    found = model().likelihoods(prompts, given, 4)
    own, _ = package()
    with torch.inference_mode():
        for snapshot, tokens, each in zip(chats, given, found, strict=True):
            state = package_chat(snapshot)
            prefilled = own._prefill(  # as its generators begin
                text=state.text,
                audio_in=state.audio_in,
                audio_in_lens=state.audio_in_lens,
                audio_out=state.audio_out,
                modality_flag=state.modality_flag,
            )
            inputs = torch.cat([prefilled, own.lfm.embed_tokens(torch.tensor([tokens]))], dim=1)
            states = own.lfm(inputs_embeds=inputs, use_cache=False).last_hidden_state[0]
            logits = states[prefilled.shape[1] - 1 : -1] @ own.lfm.embed_tokens.weight.T
            logprobs = logits.log_softmax(dim=-1)
            chosen = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            np.testing.assert_allclose(each.logprobs, chosen, atol=1e-4)
            np.testing.assert_allclose(each.top_logprobs, logprobs.topk(4).values, atol=1e-4)


def test_forced_tokens_have_the_probabilities_that_they_were_generated_with() -> None:
    """Answers of text alone, forced behind their own prompts."""
    chats = [random_chat(seed) for seed in range(40)]
    prompts = [model().encode(snapshot, GREEDY) for snapshot in chats]
    answers = model().answer(prompts, replace(GREEDY, logprobs=True), [0] * len(chats))
    places = [place for place, answer in enumerate(answers) if not answer.audio_frames]
    assert len(places) > 5
    found = model().likelihoods([prompts[at] for at in places], [answers[at].token_ids for at in places], 0)
    for place, each in zip(places, found, strict=True):
        assert answers[place].logprobs == pytest.approx(each.logprobs.tolist(), abs=1e-4)
