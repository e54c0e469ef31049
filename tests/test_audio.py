"""Sounds: the spectrogram, FedAudio's network, and generators of speech."""

import numpy as np
import pytest
import torch
from needs import needs_espeak
from tiny_models import drawn

from fedray.data.media import read_sound
from fedray.errors import ConfigError, DataError
from fedray.models.audio import LogMel, audio_conv_rnn
from fedray.synthesis.diffusion_models import sound_diffusion
from fedray.synthesis.prompts import template
from fedray.synthesis.requests import of_classes
from fedray.synthesis.spoken import espeak, hibari, speech


@pytest.mark.parametrize(("classes", "count"), [(50, 286_834), (36, 285_028)])
def test_fedaudios_network_has_its_number_of_parameters(classes, count):
    model = audio_conv_rnn((16000,), classes)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.eval()(torch.randn(2, 16000)).shape == (2, classes)
    with pytest.raises(ValueError, match=r"input_shape is \(1, 28, 28\); audio_conv_rnn takes sounds"):
        audio_conv_rnn((1, 28, 28), 10)


def test_a_tone_is_loudest_at_its_own_frequency_and_volume_does_not_matter():
    mel = LogMel(8000, 40, 512, 80)
    energy = []
    for hertz in (300, 1000, 3000):
        tone = torch.sin(2 * torch.pi * hertz * torch.arange(8000) / 8000)[None]
        spectrum = torch.stft(tone, 512, 80, window=mel.window, return_complex=True).abs().square()
        energy.append(int((mel.filters @ spectrum)[0].mean(1).argmax()))
    assert energy == sorted(energy)
    assert len(set(energy)) == 3
    noise = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mel(noise), mel(3 * noise), rtol=1e-3, atol=1e-3)
    assert mel(noise).mean(2).abs().max() < 1e-4


@needs_espeak
def test_espeak_says_the_same_from_a_seed_and_other_words_and_voices_otherwise():
    generator = espeak(batch_size=4)
    requests = of_classes(template(["one", "two"], ["{}"]), [3, 3], 0)
    say = generator.load("cpu")
    samples = say(requests)
    assert samples == say(requests)
    assert len(set(samples)) == 6
    assert all(len(read_sound(sample, 8000)) > 800 for sample in samples)
    assert espeak(voices=["en-gb"]).settings != generator.settings
    with pytest.raises(ValueError, match="slowest is 300 and fastest 200; they must be ordered"):
        espeak(slowest=300, fastest=200)


def test_hibari_says_the_same_from_a_seed(monkeypatch):
    monkeypatch.setattr("fedray.synthesis.spoken.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install hibari-tts"):
        hibari()
    monkeypatch.undo()
    pytest.importorskip("hibari", reason="needs the package hibari-tts")
    requests = of_classes(template(["one", "two"], ["{}"]), [2, 1], 0)
    samples = hibari().load("cpu")(requests)
    assert samples == hibari().load("cpu")(requests)
    assert len(set(samples)) == 3
    assert all(np.abs(read_sound(sample, 8000)).max() > 0.05 for sample in samples)
    with pytest.raises(ValueError, match=r"slowest is 2 and fastest 1; they must be ordered"):
        hibari(slowest=2, fastest=1)


def test_without_its_program_espeak_says_what_to_install(monkeypatch):
    monkeypatch.setattr("fedray.synthesis.spoken.which", lambda _: None)
    with pytest.raises(ConfigError, match="apt-get install espeak-ng"):
        espeak()


def test_speech_by_a_transformer_follows_from_words_voice_and_seed(tmp_path):
    from transformers import (
        SpeechT5Config,
        SpeechT5FeatureExtractor,
        SpeechT5ForTextToSpeech,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
        SpeechT5Processor,
    )
    from transformers.models.speecht5 import SpeechT5Tokenizer

    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the package sentencepiece")
    words = tmp_path / "words.txt"
    words.write_text("\n".join(["zero one two three four five six seven eight nine"] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(words), model_prefix=str(tmp_path / "spm"), vocab_size=40, model_type="char", minloglevel=2,
        pad_id=1, unk_id=3, bos_id=0, eos_id=2, hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = SpeechT5Tokenizer(str(tmp_path / "spm.model"))
    config = SpeechT5Config(
        vocab_size=60, hidden_size=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, num_mel_bins=8, speech_decoder_prenet_units=8,
        speaker_embedding_dim=4, speech_decoder_postnet_units=8, speech_decoder_postnet_layers=2, max_length=20,
    )  # fmt: skip
    voice = SpeechT5HifiGanConfig(
        model_in_dim=8, upsample_initial_channel=8, upsample_rates=[4], upsample_kernel_sizes=[8],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]],
    )  # fmt: skip
    drawn(SpeechT5ForTextToSpeech, config).save_pretrained(tmp_path / "tts")
    drawn(SpeechT5HifiGan, voice).save_pretrained(tmp_path / "voice")
    SpeechT5Processor(SpeechT5FeatureExtractor(num_mel_bins=8), tokenizer).save_pretrained(tmp_path / "tts")
    np.save(tmp_path / "speakers.npy", np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32))
    generator = speech(str(tmp_path / "tts"), str(tmp_path / "voice"), str(tmp_path / "speakers.npy"))
    requests = of_classes(template(["one", "two"], ["{}"]), [2, 1], 0)
    samples = generator.load("cpu")(requests)
    assert samples == generator.load("cpu")(requests)
    assert len(set(samples)) == 3
    with pytest.raises(DataError, match=r"nowhere\.npy cannot be read as a numpy array of speaker embeddings"):
        speech("a", "b", str(tmp_path / "nowhere.npy"))


def test_a_pipeline_of_sounds_follows_from_prompt_and_seed(tmp_path):
    from diffusers import AudioLDMPipeline, AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import (
        ClapTextConfig,
        ClapTextModelWithProjection,
        RobertaTokenizer,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
    )

    letters = {
        token: place
        for place, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "Ġ"])
    }
    tokenizer = RobertaTokenizer(vocab=letters, merges=[], model_max_length=24)
    text = ClapTextConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, projection_dim=8,
        vocab_size=len(letters), max_position_embeddings=32,
    )  # fmt: skip
    voice = SpeechT5HifiGanConfig(
        model_in_dim=8, sampling_rate=16000, upsample_initial_channel=8, upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]], normalize_before=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, layers_per_block=1, block_out_channels=(8, 8), cross_attention_dim=(8, 8), norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=8, class_embeddings_concat=True,
        )  # fmt: skip
        vae = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    AudioLDMPipeline(
        vae, drawn(ClapTextModelWithProjection, text), tokenizer, unet,
        DDIMScheduler(steps_offset=1, clip_sample=False), drawn(SpeechT5HifiGan, voice),
    ).save_pretrained(tmp_path)  # fmt: skip
    generator = sound_diffusion(str(tmp_path), seconds=0.01, steps=2)
    requests = of_classes(template(["one", "two"], ["a sound of {}"]), [2, 1], 0)
    samples = generator.load("cpu")(requests)
    assert samples == generator.load("cpu")(requests)
    assert len(set(samples)) == 3
    assert len(read_sound(samples[0])) == 160
