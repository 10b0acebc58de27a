"""Text-to-video pipelines, against diffusers' own on the same folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, PNDMScheduler, UniPCMultistepScheduler
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPTokenizer
from typer.testing import CliRunner

from flows.cli import app
from tests.text_tiny import BETAS, FRAMES, SIZE, WORDS, write_text_unet, write_wan
from tests.tiny import PROVENANCE
from vdmini_core.artifacts import Clip, DataManifest
from vdmini_core.data.latents import LatentCache, condition_of
from vdmini_core.data.synthetic import ALL_LABELS, describe_label, render_clip
from vdmini_core.data.video import read_clip, write_video
from vdmini_core.models import Pipeline, TextToVideoUNet, UnusableModel, Wan, load_pipeline
from vdmini_core.models.encoding import encode_dataset
from vdmini_core.models.export import export_pipeline
from vdmini_core.models.verify import verify_teacher
from vdmini_core.models.videocrafter import guidance_embedding
from vdmini_core.pruning.surgery import save_model
from vdmini_core.settings import EncodeSettings

CAPTIONS = ("a red circle moving left", "Three zebras & a cat,  growing!")
CLOSE = {"rtol": 0, "atol": 1e-4}
WRITERS: dict[str, Callable[[Path], Path]] = {
    "modelscope": write_text_unet,
    "turbo": lambda folder: write_text_unet(folder, "LCM", guidance=512),
    "wan": write_wan,
}
KINDS = pytest.mark.parametrize("kind", WRITERS)


class Teacher:
    """A tiny folder, our pipeline and diffusers' own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ours = load_pipeline(folder)
        self.stock: Any = DiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Teacher]:
    """Every kind of folder, written and loaded once; read only."""
    root = tmp_path_factory.mktemp("text")
    return {kind: Teacher(write(root / kind)) for kind, write in WRITERS.items()}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draws(index: int) -> Tensor:
    """Noise for one clip of latents."""
    return drawn(1, 4, FRAMES, SIZE // 4, SIZE // 4, seed=index)


def told(pipeline: Pipeline, *captions: str, **settings: Any) -> dict[str, Tensor]:
    images = torch.zeros(len(captions), 3, SIZE, SIZE)
    return pipeline.condition(images, captions, EncodeSettings(**settings), torch.Generator())


def stock_clip(stock: Any, steps: int, output: str) -> Tensor:
    """What the stock pipeline makes of the first caption, without guidance."""
    stock.set_progress_bar_config(disable=True)
    size: dict[str, int] = {"height": SIZE, "width": SIZE, "num_frames": FRAMES, "num_inference_steps": steps}
    size |= {"max_sequence_length": 32} if hasattr(stock, "transformer") else {}
    return stock(CAPTIONS[0], guidance_scale=1.0, latents=draws(0), output_type=output, **size).frames


def same_as_stock(pipeline: Pipeline, stock: Any, steps: int) -> bool:
    """Whether we make the same latents of the first caption."""
    ours = pipeline.sample(pipeline.denoiser, draws, told(pipeline, CAPTIONS[0]), steps)
    assert (ours - draws(0)).std() > 0.1
    return bool((ours - stock_clip(stock, steps, "latent")).abs().max() < 1e-4)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@KINDS
@torch.no_grad()
def test_the_condition_is_the_stock_pipelines(teachers: dict[str, Teacher], kind: str) -> None:
    pipeline, stock = teachers[kind].ours, teachers[kind].stock
    length = {"max_sequence_length": 32} if kind == "wan" else {"num_images_per_prompt": 1}
    expected, _ = stock.encode_prompt(list(CAPTIONS), device="cpu", do_classifier_free_guidance=False, **length)
    text = told(pipeline, *CAPTIONS)["text"]
    assert text.shape == ((2, 32, 16) if kind == "wan" else (2, 77, 16))
    torch.testing.assert_close(text, expected, **CLOSE)
    assert (text[0] - text[1]).abs().max() > 0.01
    assert (text[0, -1] == 0).all() == (kind == "wan")


def test_a_distilled_guidance_scale_is_part_of_the_condition(teachers: dict[str, Teacher]) -> None:
    assert "guidance" not in told(teachers["modelscope"].ours, *CAPTIONS)
    guidance = told(teachers["turbo"].ours, *CAPTIONS, guidance=9.0)["guidance"]
    expected = torch.cat([guidance_embedding(torch.tensor([9.0])), guidance_embedding(torch.tensor([0.0]))], 1)
    assert torch.equal(guidance, expected.expand(2, -1))


@KINDS
@torch.no_grad()
def test_decoding_is_the_stock_pipelines(teachers: dict[str, Teacher], kind: str) -> None:
    pipeline, stock = teachers[kind].ours, teachers[kind].stock
    if kind == "wan":
        latents, video = (stock_clip(stock, 1, output) for output in ("latent", "pt"))
        expected = video.transpose(1, 2) * 2 - 1
    else:
        latents = drawn(2, 4, 3, 4, 4)
        expected = stock.decode_latents(latents).clamp(-1, 1)
    torch.testing.assert_close(pipeline.decode(latents), expected, **CLOSE)


@KINDS
@torch.no_grad()
def test_encoding_is_the_stock_vaes_mode_as_the_denoiser_wants_it(teachers: dict[str, Teacher], kind: str) -> None:
    pipeline, vae = teachers[kind].ours, teachers[kind].stock.vae
    clips = drawn(2, 3, FRAMES, SIZE, SIZE).clamp(-1, 1)
    latents = pipeline.encode(clips)
    assert latents.shape[1:] == pipeline.latent_shape(FRAMES, SIZE, SIZE) == (4, FRAMES, 4, 4)
    if kind == "wan":
        modes = vae.encode(clips[1:]).latent_dist.mode()[0]
        rows = zip(modes, vae.config.latents_mean, vae.config.latents_std, strict=True)
        expected = torch.stack([(mode - mean) / std for mode, mean, std in rows])[:, 2]
    else:
        expected = vae.encode(clips[1, :, 2][None]).latent_dist.mode()[0] * vae.config.scaling_factor
    torch.testing.assert_close(latents[1, :, 2], expected, **CLOSE)


def test_wans_vae_sees_every_frame_of_a_clip_of_any_length(teachers: dict[str, Teacher]) -> None:
    pipeline = teachers["wan"].ours
    clips = drawn(1, 3, 8, SIZE, SIZE).clamp(-1, 1)
    latents = pipeline.encode(clips)
    assert latents.shape[2] == 8
    torch.testing.assert_close(latents[:, :, :5], pipeline.encode(clips[:, :, :5]), **CLOSE)
    clips[:, :, 7] = -clips[:, :, 7]
    assert (pipeline.encode(clips) - latents).abs().amax((0, 1, 3, 4)).nonzero().flatten().tolist() == [7]


def test_a_vae_that_compresses_time_takes_four_n_plus_one_frames(tmp_path: Path) -> None:
    pipeline = load_pipeline(write_wan(tmp_path, compressing_time=True))
    assert pipeline.encode(torch.zeros(1, 3, 9, SIZE, SIZE)).shape == (1, 4, 3, 4, 4)
    assert pipeline.decode(torch.zeros(1, 4, 3, 4, 4)).shape == (1, 3, 9, SIZE, SIZE)
    with pytest.raises(ValueError, match=r"8 frames do not fit .* one latent of 4 after the first; make them 5 or 9"):
        pipeline.encode(torch.zeros(1, 3, 8, SIZE, SIZE))
    with pytest.raises(ValueError, match=r"16 x 12 pixels do not fit .*multiples of 8"):
        pipeline.latent_shape(9, 16, 12)


@pytest.mark.parametrize("kind", ["modelscope", "wan"])
def test_our_sampler_is_the_stock_pipeline_without_guidance(teachers: dict[str, Teacher], kind: str) -> None:
    assert same_as_stock(teachers[kind].ours, teachers[kind].stock, steps=6)


@torch.no_grad()
def test_our_consistency_sampler_is_the_stock_lcm(
    teachers: dict[str, Teacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, unet = teachers["turbo"].ours, teachers["turbo"].stock.unet
    condition = told(pipeline, CAPTIONS[0])
    scheduler = LCMScheduler.from_pretrained(teachers["turbo"].folder / "scheduler")
    scheduler.set_timesteps(4)
    noises = iter(range(1, 4))
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: draws(next(noises)))
    expected = draws(0)
    for step in scheduler.timesteps:
        answer = unet(expected, step, condition["text"], timestep_cond=condition["guidance"]).sample
        expected = scheduler.step(answer, step, expected).prev_sample
    ours = pipeline.sample(pipeline.denoiser, draws, condition, 4)
    torch.testing.assert_close(ours, expected, **CLOSE)
    louder = pipeline.sample(pipeline.denoiser, draws, told(pipeline, CAPTIONS[0], guidance=1.0), 4)
    assert (louder - ours).abs().max() > 1e-3


def test_other_discrete_schedulers_are_sampled_by_ddim(teachers: dict[str, Teacher], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teachers["modelscope"].folder, tmp_path / "copy"))
    PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True).save_pretrained(folder / "scheduler")
    condition = told(teachers["modelscope"].ours, CAPTIONS[0])
    pipelines = teachers["modelscope"].ours, load_pipeline(folder, ["denoiser"])
    first, second = (pipeline.sample(pipeline.denoiser, draws, condition, 3) for pipeline in pipelines)
    assert torch.equal(first, second)


def test_unipc_gives_its_flow_levels_to_euler(teachers: dict[str, Teacher], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teachers["wan"].folder, tmp_path / "copy"))
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    UniPCMultistepScheduler(**flow, solver_order=1, disable_corrector=[0, 1, 2]).save_pretrained(folder / "scheduler")
    pipeline = load_pipeline(folder)
    condition = told(pipeline, CAPTIONS[0])
    scheduler = UniPCMultistepScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(3)
    expected = draws(0)
    for step, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        answer = pipeline.denoiser(expected, 1000 * sigma[None], condition)  # the stock rounds to `step`
        expected = scheduler.step(answer, step, expected).prev_sample
    torch.testing.assert_close(pipeline.sample(pipeline.denoiser, draws, condition, 3), expected, **CLOSE)


@KINDS
def test_only_the_parts_asked_for_are_loaded(teachers: dict[str, Teacher], kind: str) -> None:
    pipeline = load_pipeline(teachers[kind].folder, ["vae"])
    assert list(pipeline.parameter_counts()) == ["vae"]
    with pytest.raises(AssertionError, match="loaded without the text_encoder"):
        told(pipeline, "a")


@KINDS
def test_a_folder_says_which_clips_it_was_made_for(teachers: dict[str, Teacher], kind: str, tmp_path: Path) -> None:
    pipeline = teachers[kind].ours
    assert pipeline.default_shape() == (FRAMES, SIZE, SIZE)
    assert pipeline.stock_shape() == ((81, 480, 832) if kind == "wan" else (16, 16, 16))
    elsewhere = type(pipeline)(Path(shutil.copytree(teachers[kind].folder, tmp_path / "copy")), pipeline.models)
    (elsewhere.folder / "vdmini.json").unlink()
    assert elsewhere.default_shape() == pipeline.stock_shape()
    (elsewhere.folder / "vdmini.json").write_text('{"frames": 0, "height": 16}')
    with pytest.raises(ValueError, match=r"vdmini\.json is not a valid ClipShape: frames: .*missing key 'width'"):
        elsewhere.default_shape()


@KINDS
def test_a_teacher_is_verified_part_by_part(teachers: dict[str, Teacher], kind: str) -> None:
    manifest = verify_teacher(str(teachers[kind].folder), None)
    network = "transformer" if kind == "wan" else "unet"
    assert sorted(manifest.parameters) == sorted([network, "text_encoder", "vae"])
    assert sorted(name.split("/")[0] for name in manifest.digests) == sorted(manifest.parameters)
    assert manifest.blocks == teachers[kind].ours.denoiser.blocks
    assert manifest.pipeline == type(teachers[kind].stock).__name__


@pytest.mark.parametrize(
    ("kind", "file", "changes", "message"),
    [
        ("modelscope", "scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "only 'epsilon' is"),
        ("modelscope", "scheduler/scheduler_config.json", {"clip_sample": True}, "clip_sample is True, but only False"),
        ("modelscope", "scheduler/scheduler_config.json", {"_class_name": "Other"}, "'Other'; expected one of LCMSch"),
        ("modelscope", "unet/config.json", {"time_cond_proj_dim": 64}, "is 64; expected 256 for an embedded guidance"),
        ("wan", "scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "only False is supported yet"),
        ("wan", "scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}, "'flow_prediction' is"),
        ("wan", "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "one of FlowMatchEuler"),
        ("wan", "model_index.json", {"expand_timesteps": True}, r"Wan 2\.2 model \(expand_timesteps\)"),
        ("wan", "model_index.json", {"transformer_2": ["diffusers", "Wan"]}, r"two experts.*not supported yet"),
    ],
)
def test_what_would_be_sampled_wrongly_is_refused(
    teachers: dict[str, Teacher], tmp_path: Path, kind: str, file: str, changes: dict[str, object], message: str
) -> None:
    folder = Path(shutil.copytree(teachers[kind].folder, tmp_path / "copy"))
    edit(folder / file, **changes)
    with pytest.raises(UnusableModel, match=message):
        load_pipeline(folder, ["vae"])


def test_an_index_that_names_no_second_transformer_is_wan_21(teachers: dict[str, Teacher], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teachers["wan"].folder, tmp_path / "copy"))
    edit(folder / "model_index.json", transformer_2=[None, None], boundary_ratio=None, expand_timesteps=False)
    assert isinstance(load_pipeline(folder, ["vae"]), Wan)


def test_a_tokenizer_without_its_files_is_refused(teachers: dict[str, Teacher], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teachers["modelscope"].folder, tmp_path / "copy"))
    (folder / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(UnusableModel, match=r"neither tokenizer\.json nor vocab\.json with merges\.txt"):
        verify_teacher(str(folder), None)
    (folder / "tokenizer" / "tokenizer.json").write_text('{"version"')
    with pytest.raises(UnusableModel, match="tokenizer cannot be loaded as a tokenizer"):
        verify_teacher(str(folder), None)
    assert isinstance(load_pipeline(folder, ["denoiser", "vae"]), TextToVideoUNet)


@KINDS
def test_encoding_a_data_set_writes_what_captions_mean(teachers: dict[str, Teacher], kind: str, tmp_path: Path) -> None:
    pipeline, clips, captions = teachers[kind].ours, [], {}
    for index, label in enumerate(ALL_LABELS[::50]):
        numbers, split = (label.shape, label.colour, label.motion), "test" if index % 2 else "train"
        video = render_clip(label, np.random.default_rng(0), frames=FRAMES, size=SIZE)
        write_video(tmp_path / f"{index}.avi", video, fps=8, codec="mpeg4", crf=3)
        clips.append(Clip(path=f"{index}.avi", class_name=label.class_name, split=split, label=numbers))
        captions[numbers] = describe_label(label)
    shape = {"layout": "folder", "frames": FRAMES, "size": SIZE, "fps": None}
    data = DataManifest(root=str(tmp_path), clips=tuple(clips), skipped={}, digest="d", **shape)
    settings = EncodeSettings(train_clips=3, test_clips=2, batch_size=2)
    encode_dataset(pipeline, data, settings, tmp_path / "cache", "t", PROVENANCE)
    rows = LatentCache(tmp_path / "cache", "train").rows([0, 1, 2])
    assert rows["latents"].shape == (3, *pipeline.latent_shape(FRAMES, SIZE, SIZE))
    expected = told(pipeline, *(captions[tuple(row)] for row in rows["labels"].tolist()))
    torch.testing.assert_close(condition_of(rows), expected, **CLOSE)


@pytest.mark.parametrize(("kind", "removed"), [("modelscope", "M"), ("wan", "block.1")])
def test_an_exported_student_loads_in_diffusers_and_samples(
    teachers: dict[str, Teacher], tmp_path: Path, kind: str, removed: str
) -> None:
    student = teachers[kind].ours.denoiser.without([removed])
    save_model(student, tmp_path / "denoiser")
    folder = export_pipeline(teachers[kind].folder, tmp_path / "denoiser", tmp_path / "model")
    ours, stock = load_pipeline(folder), DiffusionPipeline.from_pretrained(folder)
    assert type(getattr(stock, ours.denoiser_folder())) is type(student.model)
    assert ours.default_shape() == (FRAMES, SIZE, SIZE)
    assert same_as_stock(ours, stock, steps=2)


@KINDS
def test_a_prompt_becomes_a_clip(teachers: dict[str, Teacher], kind: str, tmp_path: Path) -> None:
    def made(*options: str) -> Path:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.mp4"
        command = ["generate", "--model", str(teachers[kind].folder), "--out", str(out), "--steps", "2", *options]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        return out

    clip = read_clip(made("--prompt", CAPTIONS[0]), frames=FRAMES, fps=None, size=SIZE)
    assert clip.shape == (FRAMES, SIZE, SIZE, 3)
    longer = made("--prompt", CAPTIONS[0], "--frames", "8", "--seed", "1")
    assert read_clip(longer, frames=8, fps=None, size=SIZE).shape[0] == 8


def test_the_other_kind_of_input_is_refused(
    teachers: dict[str, Teacher], tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    image, out = tmp_path / "first.png", tmp_path / "clip.mp4"
    Image.fromarray(np.full((SIZE, SIZE, 3), 90, np.uint8)).save(image)

    def refusal(folder: Path, *options: str) -> str:
        result = CliRunner().invoke(app, ["generate", "--model", str(folder), "--out", str(out), *options])
        assert result.exit_code == 2
        assert not out.exists()
        return result.stderr

    text = teachers["wan"].folder
    for options in ((), ("--image", str(image)), ("--image", str(image), "--prompt", "a")):
        assert "is a text-to-video model: give --prompt, what the clip shows, and no --image" in refusal(text, *options)
    for options in ((), ("--prompt", "a"), ("--image", str(image), "--prompt", "a")):
        told_so = refusal(tiny_pipeline_folder, *options)
        assert "is an image-to-video model: give --image, the first frame, and no --prompt" in told_so


@KINDS
def test_a_built_in_tokenizer_knows_its_words_and_spells_others(teachers: dict[str, Teacher], kind: str) -> None:
    cls = AutoTokenizer if kind == "wan" else CLIPTokenizer
    tokenizer = cls.from_pretrained(teachers[kind].folder / "tokenizer")
    ends = 1 if kind == "wan" else 2
    assert all(len(tokenizer(word).input_ids) == 1 + ends for word in WORDS)
    assert len({tuple(tokenizer(word).input_ids) for word in WORDS}) == len(WORDS)
    spelled = tokenizer("zebra 7!").input_ids
    assert tokenizer.unk_token_id not in spelled[1:-1]
    assert tokenizer.decode(spelled, skip_special_tokens=True).replace(" ", "") == "zebra7!"
