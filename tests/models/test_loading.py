"""Only whole models load: every damage is named, with what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vdmini_core.artifacts import write_json
from vdmini_core.models import UnusableModel, load_denoiser, load_pipeline
from vdmini_core.models.sources import resolve_source
from vdmini_core.models.verify import teacher_folder, verify_teacher

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pipeline_copy(tmp_path: Path, tiny_pipeline_folder: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "copy"))


@pytest.fixture
def unet_copy(pipeline_copy: Path) -> Path:
    return pipeline_copy / "unet"


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_pickled_weights_are_refused(unet_copy: Path) -> None:
    torch.save(load_file(unet_copy / WEIGHTS), unet_copy / "diffusion_pytorch_model.bin")
    (unet_copy / WEIGHTS).unlink()
    with pytest.raises(UnusableModel, match=r"only pickled weights \(diffusion_pytorch_model\.bin\).*convert them"):
        load_denoiser(unet_copy)


def test_truncated_weights_are_refused(unet_copy: Path) -> None:
    whole = (unet_copy / WEIGHTS).read_bytes()
    (unet_copy / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnusableModel, match=r"unet/diffusion_pytorch_model\.safetensors is damaged or truncated"):
        load_denoiser(unet_copy)


def test_a_missing_weight_file_is_named(unet_copy: Path) -> None:
    (unet_copy / WEIGHTS).unlink()
    with pytest.raises(UnusableModel, match=r"unet has no \*\.safetensors weight file; download it again"):
        load_denoiser(unet_copy)


def test_a_missing_shard_is_named(unet_copy: Path) -> None:
    index = {"weight_map": {"a": WEIGHTS, "b": "second.safetensors"}}
    (unet_copy / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(UnusableModel, match=r"lacks second\.safetensors, which .*index\.json names"):
        load_denoiser(unet_copy)


def test_a_missing_key_is_named(unet_copy: Path) -> None:
    edit_weights(unet_copy, lambda tensors: tensors.pop("conv_in.bias"))
    with pytest.raises(UnusableModel, match=r"conv_in\.bias"):
        load_denoiser(unet_copy)


def test_an_unexpected_key_is_named(unet_copy: Path) -> None:
    edit_weights(unet_copy, lambda tensors: tensors.update({"conv_middle.bias": torch.zeros(4)}))
    with pytest.raises(UnusableModel, match=r"1 unexpected keys \(conv_middle\.bias\)"):
        load_denoiser(unet_copy)


def test_a_weight_of_another_shape_is_refused(unet_copy: Path) -> None:
    edit_weights(unet_copy, lambda tensors: tensors.update({"conv_in.bias": torch.zeros(4)}))
    with pytest.raises(UnusableModel, match=r"unet .*conv_in\.bias"):
        load_denoiser(unet_copy)


def test_an_unknown_class_is_refused_with_the_known_ones(unet_copy: Path) -> None:
    edit_config(unet_copy / "config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(UnusableModel, match=r"'UNet2DConditionModel'; expected one of UNetSpatioTemporal.*VDMiniUNet"):
        load_denoiser(unet_copy)


@pytest.mark.parametrize("text", ["not json", "{}"])
def test_a_config_that_is_none_is_refused(unet_copy: Path, text: str) -> None:
    (unet_copy / "config.json").write_text(text)
    with pytest.raises(UnusableModel, match=r"config\.json is no config of a diffusers model"):
        load_denoiser(unet_copy)


@pytest.mark.parametrize("missing", ["unet/config.json", "vae/config.json", "image_encoder/config.json"])
def test_a_missing_config_is_named(pipeline_copy: Path, missing: str) -> None:
    (pipeline_copy / missing).unlink()
    with pytest.raises(UnusableModel, match=rf"{missing} is missing; copy the whole folder"):
        load_pipeline(pipeline_copy)


@pytest.mark.parametrize("part", ["vae", "image_encoder"])
def test_other_parts_with_missing_keys_are_refused(pipeline_copy: Path, part: str) -> None:
    (file,) = (pipeline_copy / part).glob("*.safetensors")
    tensors = load_file(file)
    lost = sorted(name for name in tensors if name.endswith(".bias"))[0]
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UnusableModel, match=lost.replace(".", r"\.")):
        load_pipeline(pipeline_copy, ["vae", "conditioner"])


def test_a_folder_without_index_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(UnusableModel, match=r"model_index\.json is missing; expected a diffusers pipeline folder"):
        load_pipeline(tmp_path)


def test_an_unknown_pipeline_is_refused_with_the_known_ones(pipeline_copy: Path) -> None:
    edit_config(pipeline_copy / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(UnusableModel, match=r"'FluxPipeline'; supported are StableVideoDiffusionPipeline"):
        load_pipeline(pipeline_copy)


def test_a_scheduler_of_another_kind_is_refused(pipeline_copy: Path) -> None:
    edit_config(pipeline_copy / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    with pytest.raises(UnusableModel, match=r"uses epsilon and continuous timesteps.*needs v_prediction"):
        load_pipeline(pipeline_copy, ())


def test_an_unknown_zoo_name_lists_the_zoo() -> None:
    with pytest.raises(UnusableModel, match=r"'zoo:nothing': the zoo has zoo:i2v-shapes"):
        resolve_source("zoo:nothing")


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "nowhere"])
def test_a_source_that_is_nothing_is_refused(source: str) -> None:
    with pytest.raises(UnusableModel, match="is no folder, no zoo name and no hub id"):
        resolve_source(source)


def test_a_hub_id_without_a_revision_is_refused() -> None:
    with pytest.raises(UnusableModel, match=r"'owner/name' is no folder here; .* set teacher\.revision to a commit"):
        resolve_source("owner/name")


def test_a_local_folder_is_its_own_source(tmp_path: Path) -> None:
    assert resolve_source(str(tmp_path)) == tmp_path.resolve()


def test_a_whole_teacher_is_verified_and_found_again(pipeline_copy: Path, tmp_path: Path) -> None:
    manifest = verify_teacher(str(pipeline_copy), None)
    assert sorted(manifest.parameters) == ["image_encoder", "unet", "vae"]
    assert manifest.blocks == ("D.0", "D.1", "D.2", "D.3", "M", "U.0", "U.1", "U.2", "U.3")
    write_json(tmp_path / "teacher.json", manifest)
    assert teacher_folder(tmp_path / "teacher.json") == pipeline_copy.resolve()


def test_a_teacher_that_changed_since_it_was_verified_is_refused(pipeline_copy: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "teacher.json", verify_teacher(str(pipeline_copy), None))
    edit_weights(pipeline_copy / "unet", lambda tensors: tensors["conv_in.bias"].add_(1))
    with pytest.raises(UnusableModel, match=r"unet/.*safetensors is gone or has changed since stage teacher"):
        teacher_folder(tmp_path / "teacher.json")


@pytest.mark.parametrize("missing", ["scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json"])
def test_a_teacher_without_its_fixed_parts_is_refused(pipeline_copy: Path, missing: str) -> None:
    (pipeline_copy / missing).unlink()
    with pytest.raises(UnusableModel, match=rf"{missing} is missing; copy the whole pipeline folder"):
        verify_teacher(str(pipeline_copy), None)
