"""Players of spoken prompts: windows, words, aligned segments, and what absence leaves of them."""

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from liquid_kit import chat, sound, spoken, wav, written
from mllm_shap import (
    AudioPart,
    CoalitionMask,
    ConversationSnapshot,
    DeletePolicy,
    Message,
    PluginContext,
    PluginGroup,
    PluginRegistry,
    Role,
    TextPart,
)

from mllm_shapx.config.models import AudioSegmentation
from mllm_shapx.errors import ModelError, RowError
from mllm_shapx.explaining.audio_players import (
    RawWindowPartitioner,
    RawWindowsOptions,
    SgpaOptions,
    SgpaPartitioner,
    audio_player_set,
    window_bounds,
)
from mllm_shapx.explaining.conversation import conversation_entries
from mllm_shapx.planning.players import PlayerRule
from mllm_shapx.records.fields import in_file

RAW = AudioSegmentation(window_ms=100.0)


def _samples(snapshot: ConversationSnapshot, message: int) -> np.ndarray:
    part = next(p for p in snapshot.messages()[message].content if isinstance(p, AudioPart))
    samples: np.ndarray = soundfile.read(io.BytesIO(part.data()), dtype="float32")[0]
    return samples


@pytest.mark.parametrize(
    ("samples", "rate", "window_ms"), [(16_000, 16_000, 80.0), (44_101, 44_100, 33.3), (7, 8_000, 80.0)]
)
def test_windows_cover_the_recording_once(samples: int, rate: int, window_ms: float) -> None:
    """Windows are consecutive, never empty, and together are the whole recording."""
    bounds = window_bounds(samples, rate, window_ms)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == samples
    assert all(left[1] == right[0] for left, right in itertools.pairwise(bounds))
    lengths = [end - start for start, end in bounds]
    assert min(lengths) > 0
    assert max(lengths) <= rate * window_ms / 1000 + 1


def test_players_stand_in_conversation_order() -> None:
    """Windows of every recording and words of every written piece, the system prompt left out."""
    rng = np.random.default_rng(0)
    snapshot = chat(
        written("Be brief.", Role.SYSTEM),
        spoken(wav(sound(rng, 0.25))),
        written("What , is this ?"),
        spoken(wav(sound(rng, 0.2))),
    )
    players = audio_player_set(snapshot, RAW, PlayerRule())
    assert [(span.message_index, span.text, span.samples) for span in players.spans] == [
        (1, "", (0, 1600)),
        (1, "", (1600, 3200)),
        (1, "", (3200, 4000)),
        (2, "What", None),
        (2, "is", None),
        (2, "this", None),
        (3, "", (0, 1600)),
        (3, "", (1600, 3200)),
    ]
    assert len(set(players.player_ids)) == players.num_players


def test_absent_windows_are_cut_and_absent_words_deleted() -> None:
    """The library's delete policy joins the stretches that are present and drops absent words."""
    rng = np.random.default_rng(1)
    snapshot = chat(spoken(wav(sound(rng, 0.3))), written("one two"), spoken(wav(sound(rng, 0.1))))
    players = audio_player_set(snapshot, RAW, PlayerRule("none"))
    mask = CoalitionMask((True, False, True, False, True, False))
    rendered = DeletePolicy().apply(snapshot, players, mask)
    whole = _samples(snapshot, 0)
    np.testing.assert_allclose(_samples(rendered, 0), np.concatenate([whole[:1600], whole[3200:]]), atol=1e-4)
    assert rendered.messages()[1].text == "two"
    assert len(_samples(rendered, 2)) == 0


def test_a_transcript_beside_its_recording_is_never_read() -> None:
    """With windows as players the transcript in a spoken message is no player and left out of the prompt."""
    rng = np.random.default_rng(2)
    message = Message(
        role=Role.USER, content=(TextPart("hello there"), AudioPart(wav(sound(rng, 0.2)), 16_000))
    )
    snapshot = chat(message)
    players = audio_player_set(snapshot, RAW, PlayerRule("none"))
    assert players.num_players == 2
    everyone = DeletePolicy().apply(snapshot, players, CoalitionMask((True, True)))
    assert everyone.messages()[0].text == ""


def test_a_prompt_without_players_is_a_row_error() -> None:
    """A conversation of punctuation alone has no players, and says so."""
    with pytest.raises(RowError, match="no stretch of audio and no word") as raised:
        audio_player_set(chat(written("... !")), RAW, PlayerRule())
    assert raised.value.reason == "no_players"


def test_the_partition_is_a_plugin_of_the_library() -> None:
    """Registered in mllm_shap's registry it takes its options from the plugin context."""
    from mllm_shap import ExplainConfig

    registry = PluginRegistry()
    registry.register(PluginGroup.PARTITIONS, "raw_windows", RawWindowPartitioner)
    config = ExplainConfig.model_validate(
        {
            "backend": {"kind": "mock", "model_id": "m"},
            "explanation": {"players": "raw_windows", "plugin_options": {"raw_windows": {"window_ms": 50.0}}},
        }
    )
    plugin = registry.resolve(
        PluginGroup.PARTITIONS, "raw_windows", PluginContext(config=config, registry=registry)
    )
    assert isinstance(plugin, RawWindowPartitioner)
    assert plugin.partition(chat(spoken(wav(np.ones(1600) * 0.1)))).num_players == 2


@pytest.fixture(scope="module")
def aligner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wav2Vec2 CTC checkpoint of random weights: alignments are arbitrary, but real."""
    import torch
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
    )

    folder = tmp_path_factory.mktemp("aligner")
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
    (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    extractor = Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=16_000, padding_value=0.0)
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(letters),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16, 16),
        conv_stride=(20, 16),
        conv_kernel=(20, 16),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    return folder


def test_sgpa_gives_each_spoken_word_its_stretch(aligner: Path) -> None:
    """Players are the transcript's words with their samples, in order; the transcript itself stays unread."""
    rng = np.random.default_rng(3)
    message = Message(
        role=Role.USER, content=(TextPart("tell me , please"), AudioPart(wav(sound(rng, 1.5)), 16_000))
    )
    snapshot = chat(written("Be brief.", Role.SYSTEM), message)
    partitioner = SgpaPartitioner(options=SgpaOptions(model_id=str(aligner), revision=None))
    players = partitioner.partition(snapshot)
    assert [span.text for span in players.spans] == ["tell", "me", "please"]
    starts = [span.samples[0] for span in players.spans if span.samples is not None]
    assert starts == sorted(starts)
    assert len(starts) == 3
    assert players.hidden_text == (1,)
    rendered = DeletePolicy().apply(snapshot, players, CoalitionMask((True, False, True)))
    assert rendered.messages()[1].text == ""
    assert len(_samples(rendered, 1)) < len(_samples(snapshot, 1))


def test_a_spoken_piece_carries_its_word_where_it_is_known(aligner: Path) -> None:
    """The stretches of `sgpa` have words, windows have none; both survive the file."""
    message = Message(
        role=Role.USER,
        content=(TextPart("tell me"), AudioPart(wav(sound(np.random.default_rng(3), 1.0)), 16_000)),
    )
    snapshot = chat(message)
    aligned = SgpaPartitioner(options=SgpaOptions(model_id=str(aligner), revision=None)).partition(snapshot)
    _, (_, spoken_entry), _ = conversation_entries(snapshot, aligned, (0.5, -0.5), "yes")
    pieces = in_file(spoken_entry)["content"]
    assert [piece["text"] for piece in pieces] == ["tell", "me"]
    assert [set(piece) for piece in pieces] == [{"_binary", "num_bytes", "text"}] * 2
    windows = RawWindowPartitioner(options=RawWindowsOptions(window_ms=500.0)).partition(snapshot)
    _, (_, cut), _ = conversation_entries(snapshot, windows, (0.5, -0.5), "yes")
    assert [set(piece) for piece in in_file(cut)["content"]] == [{"_binary", "num_bytes"}] * 2


def test_sgpa_without_a_transcript_is_a_row_error(aligner: Path) -> None:
    """A recording without text cannot be aligned: the row fails in words."""
    partitioner = SgpaPartitioner(options=SgpaOptions(model_id=str(aligner), revision=None))
    with pytest.raises(RowError, match=r"column_mapping\.text") as raised:
        partitioner.partition(chat(spoken(wav(np.ones(1600) * 0.1))))
    assert raised.value.reason == "no_transcript"


def test_sgpa_refuses_a_text_too_long_for_its_recording(aligner: Path) -> None:
    """A recording shorter than its transcript's letters is a row error, not a crash."""
    message = Message(
        role=Role.USER, content=(TextPart("a very long sentence " * 9), AudioPart(wav(np.ones(1600)), 16_000))
    )
    partitioner = SgpaPartitioner(options=SgpaOptions(model_id=str(aligner), revision=None))
    with pytest.raises(RowError) as raised:
        partitioner.partition(chat(message))
    assert raised.value.reason == "not_aligned"


def test_a_missing_aligner_is_named(tmp_path: Path) -> None:
    """Without the aligner's weights the error says what is missing and what to do instead."""
    missing = SgpaPartitioner(options=SgpaOptions(model_id=str(tmp_path / "none"), revision=None))
    message = Message(role=Role.USER, content=(TextPart("hello"), AudioPart(wav(np.ones(1600)), 16_000)))
    with pytest.raises(ModelError, match=r"needs the aligner .*method 'raw'"):
        missing.partition(chat(message))
