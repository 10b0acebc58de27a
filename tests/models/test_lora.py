"""A LoRA made for the teacher means the same on the student, as far as its layers survive."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from flows.cli import app
from tests.models import tiny_transformers
from tests.models.tiny_unets import CLASSES, SVD, answer_of, new_unet_of
from tests.pruning.test_surgery import plan_for
from tests.tiny import write_pipeline
from vdmini_core.artifacts import write_json
from vdmini_core.models import Denoiser, UNetDenoiser
from vdmini_core.models.loading import UnusableModel
from vdmini_core.models.lora import map_lora, map_lora_file
from vdmini_core.models.published import blueprint
from vdmini_core.pruning.planning import paper_layout
from vdmini_core.settings import PlanSettings

LAYERS = ("to_q", "to_v", "conv", "conv1", "linear_1", "time_emb_proj")  # in units, samplers and embeddings
TRANSFORMERS = {
    "WanTransformer3DModel": ("block.1",),
    "HunyuanVideoTransformer3DModel": ("double.0", "single.1"),
}
PAPER = paper_layout(new_unet_of(SVD), PlanSettings())
CASES = {name: PAPER for name in CLASSES} | TRANSFORMERS


def new_teacher(name: str) -> Denoiser:
    return tiny_transformers.new_transformer(name) if name in TRANSFORMERS else new_unet_of(name)


def answer(denoiser: Denoiser) -> Tensor:
    return answer_of(denoiser) if isinstance(denoiser, UNetDenoiser) else tiny_transformers.answer_of(denoiser)


def part_of(name: str) -> str:
    return "transformer" if name in TRANSFORMERS else "unet"


def new_lora(teacher: Denoiser, part: str, rank: int = 2) -> dict[str, Tensor]:
    """Random weights A and B, with an alpha, for every layer of the kinds in LAYERS."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for path, module in teacher.model.named_modules():
        if path.split(".")[-1] in LAYERS and isinstance(module, nn.Linear | nn.Conv2d):
            out, into, *kernel = module.weight.shape
            state[f"{part}.{path}.lora_A.weight"] = torch.randn(rank, into, *kernel, generator=generator) * 0.1
            state[f"{part}.{path}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.1
            state[f"{part}.{path}.alpha"] = torch.tensor(4.0)
    return state


def apply(denoiser: Denoiser, state: dict[str, Tensor], part: str) -> None:
    """W + alpha / rank * B A, by hand."""
    for key in [key for key in state if key.endswith(".lora_A.weight")]:
        path = key.removesuffix(".lora_A.weight")
        a, b = state[key], state[f"{path}.lora_B.weight"]
        change = (b @ a.flatten(1)).unflatten(1, a.shape[1:]) * state[f"{path}.alpha"] / len(a)
        denoiser.model.get_submodule(path.removeprefix(f"{part}.")).weight += change


@pytest.mark.parametrize("name", CASES)
def test_the_students_lora_is_the_teachers_under_bypass(name: str) -> None:
    teacher, removed, part = new_teacher(name), CASES[name], part_of(name)
    student, state = teacher.without(removed), new_lora(teacher, part)
    kept, dropped = map_lora(state, teacher, removed)
    assert len(kept) + len(dropped) == len(state)
    assert dropped
    plain = answer(student)
    apply(student, kept, part)
    apply(teacher, state, part)  # what belongs to removed units falls silent with them
    with teacher.bypass(removed):
        expected = answer(teacher)
    torch.testing.assert_close(answer(student), expected, rtol=0, atol=1e-4)
    assert (expected - plain).abs().max() > 0.01


def test_units_are_renumbered_and_what_goes_with_a_stage_is_dropped() -> None:
    keys = {
        "unet.up_blocks.3.attentions.2.proj_in": "unet.up_blocks.2.attentions.1.proj_in",
        "unet.up_blocks.1.upsamplers.0.conv": "unet.up_blocks.0.upsamplers.0.conv",
        "down_blocks.1.downsamplers.0.conv": "down_blocks.1.downsamplers.0.conv",
        "unet.time_embedding.linear_1": "unet.time_embedding.linear_1",
        "text_encoder.layers.0.q": "text_encoder.layers.0.q",
        "unet.up_blocks.3.attentions.1.proj_in": None,
        "unet.down_blocks.2.downsamplers.0.conv": None,
        "unet.up_blocks.0.upsamplers.0.conv": None,
        "unet.mid_block.attentions.0.proj_in": None,
    }
    state = {f"{key}.lora_A.weight": torch.tensor(float(index)) for index, key in enumerate(keys)}
    kept, dropped = map_lora(state, new_unet_of(SVD), PAPER)
    assert list(kept) == [f"{new}.lora_A.weight" for new in keys.values() if new is not None]
    assert dropped == [f"{old}.lora_A.weight" for old, new in keys.items() if new is None]
    assert [int(value) for value in kept.values()] == list(range(len(kept)))


@pytest.mark.parametrize(
    "ending", ["lora_A.default.weight", "lora_B.bias", "lora.down.weight", "lora_magnitude_vector"]
)
def test_every_kind_of_weight_keeps_its_ending(ending: str) -> None:
    state = {f"unet.up_blocks.3.attentions.2.proj_in.{ending}": torch.zeros(1)}
    assert list(map_lora(state, new_unet_of(SVD), PAPER)[0]) == [f"unet.up_blocks.2.attentions.1.proj_in.{ending}"]


@pytest.mark.parametrize(
    "key",
    [
        "unet.down_blocks.7.attentions.0.proj_in.lora_A.weight",
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        "unet.conv_in.weight",
        "transformer.blocks.0.attn1.to_q.lora_A.weight",
    ],
)
def test_a_lora_of_another_model_or_format_is_refused_by_key(key: str) -> None:
    with pytest.raises(UnusableModel, match=rf"^{key} is no LoRA weight of a layer of this UNetSpatioTemporal"):
        map_lora({key: torch.zeros(1)}, new_unet_of(SVD), PAPER)


def test_a_file_keeps_its_header_and_its_adapter_config_follows(tmp_path: Path) -> None:
    teacher = new_unet_of(SVD)
    old, gone = "up_blocks.3.attentions.2.proj_in", "up_blocks.3.attentions.1.proj_in"
    config: dict[str, Any] = {
        "unet.r": 2,
        "unet.lora_alpha": 4,
        "unet.target_modules": [old, gone, "to_q"],
        "unet.rank_pattern": {old: 8, gone: 8},
        "unet.bias": "none",
    }
    state = {f"unet.{path}.lora_A.weight": torch.ones(2) for path in (old, gone)}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    save_file(state, tmp_path / "lora.safetensors", metadata=header)
    count, dropped = map_lora_file(tmp_path / "lora.safetensors", tmp_path / "new/lora.safetensors", teacher, PAPER)
    new = "up_blocks.2.attentions.1.proj_in"
    assert (count, dropped) == (1, [f"unet.{gone}.lora_A.weight"])
    with safe_open(tmp_path / "new/lora.safetensors", "pt") as stream:
        assert list(stream.keys()) == [f"unet.{new}.lora_A.weight"]
        found = stream.metadata()
    assert found["format"] == "pt"
    changed = {"unet.target_modules": [new, "to_q"], "unet.rank_pattern": {new: 8}}
    assert json.loads(found["lora_adapter_metadata"]) == config | changed


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"unet.conv_in.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UnusableModel, match=r"lora\.safetensors is no readable safetensors file .* refused"):
        map_lora_file(tmp_path / "lora.safetensors", tmp_path / "new", new_unet_of(SVD), PAPER)


@pytest.mark.parametrize("name", [SVD, "WanTransformer3DModel"])
def test_the_graph_of_a_folder_is_the_networks_without_its_weights(name: str, tmp_path: Path) -> None:
    for denoiser in (teacher := new_teacher(name), teacher.without(CASES[name])):
        denoiser.model.save_pretrained(tmp_path)
        graph = blueprint(str(tmp_path)).build()
        assert graph.units == denoiser.units
        assert type(graph.model) is type(denoiser.model)
        assert {tensor.device.type for tensor in graph.model.state_dict().values()} == {"meta"}


def test_the_command_lists_what_it_dropped(tmp_path: Path) -> None:
    teacher = new_unet_of(SVD)
    write_pipeline(tmp_path / "teacher")
    write_json(tmp_path / "plan.json", plan_for(teacher, PAPER))
    state = new_lora(teacher, "unet")
    save_file(state, tmp_path / "lora.safetensors")
    where = [str(tmp_path / "lora.safetensors"), str(tmp_path / "new.safetensors")]
    options = ["--plan", str(tmp_path / "plan.json"), "--teacher", str(tmp_path / "teacher")]
    result = CliRunner().invoke(app, ["lora", *where, *options])
    kept, dropped = map_lora(state, teacher, PAPER)
    assert result.exit_code == 0, result.output
    assert f"{len(kept)} weights" in result.stdout
    assert sorted(line.strip() for line in result.stdout.splitlines()[1:]) == sorted(dropped)
    assert load_file(where[1]).keys() == kept.keys()
