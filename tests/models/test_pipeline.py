"""The pipeline around the network, against diffusers' own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from PIL import Image
from safetensors.torch import load_file

from tests.models.tiny_unets import SVD as STOCK
from tests.models.tiny_unets import TEXT_3D, new_unet_of
from tests.tiny import EVEN, new_inputs, new_unet, output_of
from vdmini_core.models import SVD, IllegalPlan, load_pipeline
from vdmini_core.models.export import export_pipeline
from vdmini_core.models.generating import read_image
from vdmini_core.pruning.planning import paper_layout
from vdmini_core.pruning.surgery import save_model
from vdmini_core.settings import EncodeSettings, PlanSettings


@pytest.fixture(scope="module")
def stock(tiny_pipeline_folder: Path) -> StableVideoDiffusionPipeline:
    return StableVideoDiffusionPipeline.from_pretrained(tiny_pipeline_folder)


def test_the_condition_is_the_stock_pipelines(stock: StableVideoDiffusionPipeline, tiny_pipeline: SVD) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    ours = tiny_pipeline.condition(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1,
        [""],
        EncodeSettings(fps=9, motion_bucket_id=63, noise_augmentation=0.1),
        torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        embedding = stock._encode_image(picture, "cpu", 1, False)
        image = stock.video_processor.preprocess(picture, height=64, width=64)
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
        latents = stock._encode_vae_image(image + 0.1 * noise, "cpu", 1, False)
    torch.testing.assert_close(ours["image_embedding"], embedding, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["image_latents"], latents, rtol=1e-4, atol=1e-5)
    expected = stock._get_add_time_ids(9 - 1, 63, 0.1, torch.float32, 1, 1, False)
    torch.testing.assert_close(ours["added_time_ids"], expected)


def test_decoding_is_the_stock_pipelines(stock: StableVideoDiffusionPipeline, tiny_pipeline: SVD) -> None:
    latents = new_inputs(2, size=8)[0]
    with torch.no_grad():
        expected = stock.decode_latents(latents.transpose(1, 2), latents.shape[2], latents.shape[2])
    torch.testing.assert_close(tiny_pipeline.decode(latents), expected.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_encoding_scales_the_mode_of_every_frame(stock: StableVideoDiffusionPipeline, tiny_pipeline: SVD) -> None:
    clips = torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        frame = stock.vae.encode(clips[1, :, 2][None]).latent_dist.mode()[0] * stock.vae.config.scaling_factor
    ours = tiny_pipeline.encode(clips)
    assert ours.shape == (2, 4, 3, 8, 8)
    torch.testing.assert_close(ours[1, :, 2], frame, rtol=1e-4, atol=1e-5)


def test_only_the_parts_asked_for_are_loaded(tiny_pipeline_folder: Path) -> None:
    pipeline = load_pipeline(tiny_pipeline_folder, ["vae"])
    assert list(pipeline.parameter_counts()) == ["vae"]
    with pytest.raises(AssertionError, match="loaded without the unet"):
        _ = pipeline.denoiser


@pytest.mark.parametrize("removed", ["paper", ("D.0.1", "U.3.1")])
def test_an_exported_pipeline_loads_in_diffusers_and_samples(
    tiny_pipeline_folder: Path, tmp_path: Path, removed: str | tuple[str, ...]
) -> None:
    teacher = new_unet(EVEN)
    student = teacher.without(paper_layout(teacher, PlanSettings()) if removed == "paper" else removed)
    save_model(student, tmp_path / "unet")
    model = export_pipeline(tiny_pipeline_folder, tmp_path / "unet", tmp_path / "model")
    image = Image.fromarray(np.full((64, 64, 3), 90, np.uint8))

    pipeline = StableVideoDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(image, height=64, width=64, num_frames=2, num_inference_steps=1).frames[0]

    assert [frame.size for frame in frames] == [(64, 64)] * 2
    assert type(pipeline.unet) is type(student.model)
    ours = load_pipeline(model, ["denoiser"]).denoiser
    torch.testing.assert_close(output_of(ours, new_inputs()), output_of(student, new_inputs()), rtol=0, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"unet", "model"}


def test_a_student_without_mid_block_can_be_exported_as_a_stock_checkpoint(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    teacher = new_unet(EVEN)
    student = teacher.without(paper_layout(teacher, PlanSettings()))
    save_model(student, tmp_path / "unet")
    model = export_pipeline(tiny_pipeline_folder, tmp_path / "unet", tmp_path / "model", stock=True)

    assert json.loads((model / "model_index.json").read_text())["unet"] == ["diffusers", STOCK]
    assert "removed_units" not in json.loads((model / "unet/config.json").read_text())
    pipeline = StableVideoDiffusionPipeline.from_pretrained(model)
    assert type(pipeline.unet) is UNetSpatioTemporalConditionModel
    ours = load_pipeline(model, ["denoiser"]).denoiser
    torch.testing.assert_close(output_of(ours, new_inputs()), output_of(student, new_inputs()), rtol=0, atol=1e-5)


def test_a_stock_export_of_a_student_that_is_stock_already_changes_nothing(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    save_model(new_unet().without(["D.0.1", "U.3.1"]), tmp_path / "unet")
    models = [
        export_pipeline(tiny_pipeline_folder, tmp_path / "unet", tmp_path / f"model-{stock}", stock=stock)
        for stock in (False, True)
    ]
    assert [json.loads((model / "model_index.json").read_text())["unet"] for model in models] == [
        ["diffusers", STOCK]
    ] * 2
    weights, again = (load_file(model / "unet/diffusion_pytorch_model.safetensors") for model in models)
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_student_that_no_stock_config_can_say_is_refused_by_name(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    save_model(new_unet_of(TEXT_3D).without(["D.0.1", "U.3.1"]), tmp_path / "unet")
    told = r"is a VDMiniUNet3D, and no config of UNet3DConditionModel says .*; set register\.mid to none"
    with pytest.raises(IllegalPlan, match=told):
        export_pipeline(tiny_pipeline_folder, tmp_path / "unet", tmp_path / "model", stock=True)
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]


def test_exporting_again_replaces_the_folder_as_a_whole(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    save_model(new_unet(), tmp_path / "unet")
    for _ in range(2):
        model = export_pipeline(tiny_pipeline_folder, tmp_path / "unet", tmp_path / "model")
        (model / "left-over").touch()
    (model / "left-over").unlink()
    assert json.loads((model / "model_index.json").read_text())["unet"][0] == "diffusers"
    assert {p.name for p in model.iterdir()} == {p.name for p in tiny_pipeline_folder.iterdir()}


def test_an_image_is_resized_by_its_short_side_and_cropped(tmp_path: Path) -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 16, 16)
    assert image.shape == (1, 3, 16, 16)
    assert image[..., 2:-2].min() > 0.9
    assert image.abs().max() <= 1


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"a\.png is no readable image"):
        read_image(tmp_path / "a.png", 16, 16)
