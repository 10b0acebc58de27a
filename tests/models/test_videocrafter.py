"""VideoCrafter2's U-Net becomes diffusers' own, weight for weight; anything less is refused.

tests/data/vc2_tiny.safetensors is a shrunken VideoCrafter2-layout checkpoint (motion guidance, random weights
in float16) with inputs and the reference implementation's own output for them in float32.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, LCMScheduler, UNet3DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from flows.cli import app
from vdmini_core.artifacts import file_digest, read_json
from vdmini_core.models.loading import UnusableModel
from vdmini_core.models.videocrafter import (
    PREFIX,
    Conversion,
    UNetArguments,
    convert_checkpoint,
    convert_unet,
    guidance_embedding,
    read_arguments,
    read_checkpoint,
)

ORACLE = Path(__file__).parents[1] / "data" / "vc2_tiny.safetensors"
FPS = 8
REFERENCE_COUNTS = {"VideoCrafter2": 1_413_284_420, "no_mg": 1_413_366_340, "mg": 1_413_653_060}
CONVERTED_COUNTS = {"VideoCrafter2": 1_411_233_860, "no_mg": 1_411_315_780, "mg": 1_411_397_700}
PROJECTIONS = {"VideoCrafter2": (), "no_mg": ("time",), "mg": ("time", "motion")}

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def oracle() -> Tensors:
    """`input.*`, `output.eps` and `weights.*`, as the file stores them."""
    with safe_open(ORACLE, "pt") as stream:
        return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118


@pytest.fixture
def weights(oracle: Tensors) -> Tensors:
    """The reference's state dict in float16, to take keys from or add to."""
    return {name.removeprefix("weights."): value for name, value in oracle.items() if name.startswith("weights.")}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The constructor's arguments in the public yaml's layout."""
    with safe_open(ORACLE, "pt") as stream:
        arguments = json.loads(stream.metadata()["config"])
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    public = {"model": {"params": {"timesteps": 1000, "unet_config": {"target": "UNetModel", "params": arguments}}}}
    path.write_text(yaml.safe_dump(public))
    return path


@pytest.fixture(scope="module")
def config(config_file: Path) -> UNetArguments:
    return read_arguments(config_file)


@torch.no_grad()
def error_of(unet: UNet3DConditionModel, oracle: Tensors) -> float:
    """The largest difference to the reference's output."""
    condition = torch.cat([guidance_embedding(oracle["input.w"]), guidance_embedding(oracle["input.motion_gs"])], 1)
    inputs = (oracle["input.x"], oracle["input.timesteps"], oracle["input.context"])
    return float((unet(*inputs, timestep_cond=condition).sample - oracle["output.eps"]).abs().max())


def reference_shapes(
    width: int, factors: tuple[int, ...], heads: int, context: int, projections: tuple[str, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The reference's keys, written down from its constructor: two pairs a stage, attention in all but the last."""

    def layer(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]

    def resnet(name: str, old: int, new: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from layer(f"{name}.in_layers.0", old)
        yield from layer(f"{name}.in_layers.2", new, old, 3, 3)
        yield from layer(f"{name}.emb_layers.1", new, 4 * width)
        yield from layer(f"{name}.out_layers.0", new)
        yield from layer(f"{name}.out_layers.3", new, new, 3, 3)
        if old != new:
            yield from layer(f"{name}.skip_connection", new, old, 1, 1)
        for number, place in ((1, 2), (2, 3), (3, 3), (4, 3)):
            yield from layer(f"{name}.temopral_conv.conv{number}.0", new)
            yield from layer(f"{name}.temopral_conv.conv{number}.{place}", new, new, 3, 1, 1)

    def transformer(
        name: str, outer: int, inner: int, seen: int, *kernel: int
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from layer(f"{name}.norm", outer)
        yield from layer(f"{name}.proj_in", inner, outer, *kernel)
        yield from layer(f"{name}.proj_out", outer, inner, *kernel)
        block = f"{name}.transformer_blocks.0"
        for attention, source in (("attn1", inner), ("attn2", seen)):
            yield f"{block}.{attention}.to_q.weight", (inner, inner)
            yield f"{block}.{attention}.to_k.weight", (inner, source)
            yield f"{block}.{attention}.to_v.weight", (inner, source)
            yield from layer(f"{block}.{attention}.to_out.0", inner, inner)
        yield from layer(f"{block}.ff.net.0.proj", 8 * inner, inner)
        yield from layer(f"{block}.ff.net.2", inner, 4 * inner)
        for norm in ("norm1", "norm2", "norm3"):
            yield from layer(f"{block}.{norm}", inner)

    def attentions(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from transformer(f"{name}.1", channels, channels, context)
        yield from transformer(f"{name}.2", channels, channels, channels)

    for embedding in ("time_embed", "fps_embedding"):
        yield from layer(f"{embedding}.0", 4 * width, width)
        yield from layer(f"{embedding}.2", 4 * width, 4 * width)
    for projection in projections:
        yield f"{projection}_cond_proj.weight", (width, 256)
    if "motion" in projections:
        yield "combine_proj.weight", (width, 2 * width)
    yield from layer("input_blocks.0.0", width, 4, 3, 3)
    yield from transformer("init_attn.0", width, 8 * heads, 8 * heads, 1)
    skips, now, entry, deepest = [width], width, 1, len(factors) - 1
    for stage, factor in enumerate(factors):
        for _ in range(2):
            yield from resnet(f"input_blocks.{entry}.0", now, width * factor)
            now = width * factor
            if stage < deepest:
                yield from attentions(f"input_blocks.{entry}", now)
            skips.append(now)
            entry += 1
        if stage < deepest:
            yield from layer(f"input_blocks.{entry}.0.op", now, now, 3, 3)
            skips.append(now)
            entry += 1
    yield from resnet("middle_block.0", now, now)
    yield from attentions("middle_block", now)
    yield from resnet("middle_block.3", now, now)
    for entry in range(3 * len(factors)):
        stage = deepest - entry // 3
        yield from resnet(f"output_blocks.{entry}.0", now + skips.pop(), width * factors[stage])
        now = width * factors[stage]
        if stage < deepest:
            yield from attentions(f"output_blocks.{entry}", now)
        if stage and entry % 3 == 2:
            yield from layer(f"output_blocks.{entry}.{3 if stage < deepest else 1}.conv", now, now, 3, 3)
    yield from layer("out.0", width)
    yield from layer("out.2", 4, width, 3, 3)


def test_the_converted_unet_answers_as_the_reference(oracle: Tensors, weights: Tensors, config: UNetArguments) -> None:
    """The oracle's 32 channels make one channel a group, so its norms take away what the embedding added.

    It answers alike whatever t, w, m and fps; the two tests below are about the embedding.
    """
    assert error_of(convert_unet(weights, config, FPS), oracle) < 1e-5


@torch.no_grad()
def test_the_embedding_is_the_references_formula(oracle: Tensors, weights: Tensors, config: UNetArguments) -> None:
    exact = {name: value.double() for name, value in weights.items()}
    times, width = oracle["input.timesteps"], config.model_channels
    w, m = guidance_embedding(oracle["input.w"]), guidance_embedding(oracle["input.motion_gs"])

    def embed(name: str, value: Tensor, condition: Tensor | float = 0.0) -> Tensor:
        angles = value.double()[:, None] * 10000 ** (-torch.arange(width // 2).double() / (width // 2))
        hidden = torch.cat([angles.cos(), angles.sin()], 1) + condition
        hidden = hidden @ exact[f"{name}.0.weight"].T + exact[f"{name}.0.bias"]
        return hidden * hidden.sigmoid() @ exact[f"{name}.2.weight"].T + exact[f"{name}.2.bias"]

    both = [w.double() @ exact["time_cond_proj.weight"].T, m.double() @ exact["motion_cond_proj.weight"].T]
    expected = embed("time_embed", times, torch.cat(both, 1) @ exact["combine_proj.weight"].T)
    expected = expected + embed("fps_embedding", torch.tensor([FPS]))
    unet = convert_unet(weights, config, FPS)
    got = unet.time_embedding(unet.time_proj(times), torch.cat([w, m], 1))
    assert float((got - expected).abs().max()) < 1e-5


def test_every_resnet_projects_the_embedding_with_its_own_weights(weights: Tensors, config: UNetArguments) -> None:
    state = convert_unet(weights, config, FPS).state_dict()
    resnets = [name.removesuffix(".in_layers.2.weight") for name in weights if name.endswith(".in_layers.2.weight")]
    ours = [name.removesuffix(".conv1.weight") for name in state if name.endswith(".conv1.weight")]
    assert len(resnets) == len(ours) == 22
    for name in ours:
        first = state[f"{name}.conv1.weight"].half()  # the oracle's dtype, so nothing is lost
        (same,) = [r for r in resnets if first.equal(weights[f"{r}.in_layers.2.weight"])]
        for part in ("weight", "bias"):
            assert torch.equal(weights[f"{same}.emb_layers.1.{part}"].float(), state[f"{name}.time_emb_proj.{part}"])


@pytest.mark.parametrize("name", ["bare.pt", "legacy.pt", "whole.ckpt", "bare.safetensors", "whole.safetensors"])
def test_a_converted_file_is_loaded_by_stock_diffusers(
    oracle: Tensors, weights: Tensors, config_file: Path, tmp_path: Path, name: str
) -> None:
    source, out = tmp_path / name, tmp_path / "converted"
    whole = {PREFIX + key: value for key, value in weights.items()} | {"first_stage_model.x": torch.zeros(1)}
    tensors = whole if name.startswith("whole") else weights
    if source.suffix == ".safetensors":
        save_file(tensors, source)
    elif source.suffix == ".ckpt":
        torch.save({"state_dict": tensors, "epoch": 1}, source)
    else:
        torch.save(tensors, source, _use_new_zipfile_serialization=name != "legacy.pt")
    assert convert_checkpoint(source, out, config_file) == out

    unet, info = UNet3DConditionModel.from_pretrained(out / "unet", output_loading_info=True)
    assert not any(info.values())
    assert error_of(unet.eval(), oracle) < 1e-5
    record = read_json(out / "conversion.json", Conversion)
    assert (record.source, record.sha256, record.fps) == (name, file_digest(source), FPS)
    assert record.parameters == sum(value.numel() for value in unet.parameters())
    assert (record.config.time_cond_proj_dim, record.config.motion_cond_proj_dim) == (256, 256)
    assert sorted(path.name for path in out.iterdir()) == ["conversion.json", "model_index.json", "scheduler", "unet"]
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []


def test_the_folder_is_a_pipeline_once_the_other_parts_are_there(
    weights: Tensors, config_file: Path, tmp_path: Path
) -> None:
    save_file(weights, tmp_path / "unet.safetensors")
    out = convert_checkpoint(tmp_path / "unet.safetensors", tmp_path / "out", config_file)
    pipeline = DiffusionPipeline.from_pretrained(out, vae=None, text_encoder=None, tokenizer=None)
    assert type(pipeline).__name__ == "TextToVideoSDPipeline"
    scheduler = pipeline.scheduler
    assert isinstance(scheduler, LCMScheduler)
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist() == [999 - 125 * step for step in range(8)]
    index = json.loads((out / "model_index.json").read_text())
    assert {"vae", "text_encoder", "tokenizer", "unet", "scheduler"} <= set(index)


def test_the_written_reference_layout_is_the_oracles(weights: Tensors) -> None:
    written = dict(reference_shapes(32, (1, 1, 1, 1), 8, 24, PROJECTIONS["mg"]))
    assert written == {name: tuple(value.shape) for name, value in weights.items()}


@pytest.mark.parametrize("variant", REFERENCE_COUNTS)
def test_the_public_models_convert_at_full_size(variant: str) -> None:
    shapes = dict(reference_shapes(320, (1, 2, 4, 4), 64, 1024, PROJECTIONS[variant]))
    assert sum(math.prod(shape) for shape in shapes.values()) == REFERENCE_COUNTS[variant]
    reference = {name: torch.empty(shape, device="meta", dtype=torch.float16) for name, shape in shapes.items()}
    unet = convert_unet(reference, UNetArguments(), FPS)
    inputs = 256 * len(PROJECTIONS[variant])
    assert unet.config.time_cond_proj_dim == (inputs or None)
    assert unet.num_parameters() == CONVERTED_COUNTS[variant]
    # Gone are the fps embedding and the projections; one projection of all their inputs has come.
    gone = [math.prod(shape) for name, shape in shapes.items() if "fps_embedding" in name or "_proj." in name[:20]]
    assert unet.num_parameters() == REFERENCE_COUNTS[variant] - sum(gone) + 320 * inputs


def test_without_motion_guidance_the_projection_is_the_references_own(weights: Tensors, config_file: Path) -> None:
    config = read_arguments(config_file).model_copy(update={"motion_cond_proj_dim": None})
    del weights["motion_cond_proj.weight"], weights["combine_proj.weight"]
    unet = convert_unet(weights, config, FPS)
    assert torch.equal(unet.time_embedding.cond_proj.weight, weights["time_cond_proj.weight"].float())
    bias = {fps: convert_unet(weights, config, fps).time_embedding.linear_2.bias for fps in (8, 16)}
    assert not torch.allclose(bias[8], bias[16])


def test_guidance_embedding_is_the_formula() -> None:
    scales = torch.tensor([0.0, 0.05, 7.5])
    embedding = guidance_embedding(scales, 8)
    angles = [[1000 * float(s) * 10000 ** (-i / 3) for i in range(4)] for s in scales]
    expected = [[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angles]
    assert torch.allclose(embedding, torch.tensor(expected), atol=1e-3)
    assert guidance_embedding(scales).shape == (3, 256)


class Foreign:
    """Any object: its pickle names a class to import."""


def test_a_pickle_of_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "object.pt"
    torch.save({"state_dict": {}, "hyper_parameters": Foreign()}, path)
    with pytest.raises(UnusableModel, match=r"object\.pt is no pickle of plain tensors; other objects can run code"):
        read_checkpoint(path)


def test_damaged_and_foreign_files_are_named(weights: Tensors, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("half.pt", "text.pt", "text.safetensors"):
        with pytest.raises(UnusableModel, match=rf"{name} cannot be read .* if it is damaged, download it again"):
            read_checkpoint(tmp_path / name)
    torch.save([1], tmp_path / "list.pt")
    torch.save({"state_dict": [1]}, tmp_path / "nested.pt")
    torch.save({"state_dict": {"conv.weight": torch.zeros(1)}}, tmp_path / "other.pt")
    for name in ("list.pt", "nested.pt", "other.pt"):
        with pytest.raises(UnusableModel, match=rf"{name} holds no VideoCrafter2 U-Net: time_embed\.0\.weight and"):
            read_checkpoint(tmp_path / name)
    with pytest.raises(UnusableModel, match=r"nothing\.pt is no file; expected model\.ckpt"):
        read_checkpoint(tmp_path / "nothing.pt")


def test_every_key_has_to_be_there_and_used(weights: Tensors, config: UNetArguments) -> None:
    del weights["middle_block.1.proj_in.bias"], weights["combine_proj.weight"]
    weights["input_blocks.1.1.relative_position_k"] = torch.zeros(1)
    told = r"2 missing \(combine_proj\.weight, middle_block\.1\.proj_in\.bias\); 1 unexpected \(.*relative_position_k\)"
    with pytest.raises(UnusableModel, match=told):
        convert_unet(weights, config, FPS)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_channels": 64}, r"of another shape \(combine_proj\.weight \[32, 64\] instead of \[64, 128\]"),
        ({"num_head_channels": 16}, r"of another shape \(init_attn\.0\.proj_in"),
        ({"attention_resolutions": (4, 2)}, r"unexpected \(input_blocks\.1\.1\.norm\.bias"),
        ({"channel_mult": (1, 1, 1)}, r"unexpected \(input_blocks\.10"),
        ({"num_res_blocks": 3}, r"missing \(input_blocks"),
        ({"time_cond_proj_dim": 128}, r"time_cond_proj\.weight \[32, 256\] instead of \[32, 128\]"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    weights: Tensors, config: UNetArguments, changes: dict[str, object], told: str
) -> None:
    with pytest.raises(UnusableModel, match=f"weights and configuration disagree: .*{told}"):
        convert_unet(weights, config.model_copy(update=changes), FPS)


def test_motion_guidance_needs_the_other_projection(weights: Tensors, config: UNetArguments) -> None:
    del weights["time_cond_proj.weight"]
    open_config = config.model_copy(update={"time_cond_proj_dim": None, "motion_cond_proj_dim": None})
    with pytest.raises(UnusableModel, match=r"1 missing \(time_cond_proj\.weight\)"):
        convert_unet(weights, open_config, FPS)


def test_arguments_are_read_from_every_layout(config_file: Path, config: UNetArguments, tmp_path: Path) -> None:
    public = yaml.safe_load(config_file.read_text())["model"]["params"]
    for name, values in {
        "unet": {"unet_config": public["unet_config"]},
        "bare": public["unet_config"]["params"],
    }.items():
        (tmp_path / name).write_text(json.dumps(values))
        assert read_arguments(tmp_path / name) == config
    assert read_arguments(None) == UNetArguments()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("use_relative_position: true", "use_relative_position is True, but only False can be converted"),
        ("use_causal_attention: true", "use_causal_attention is True, but only False can be converted"),
        ("fps_cond: false", "fps_cond is False, but only True can be converted"),
        ("model_chanels: 320", "unknown key 'model_chanels'"),
        ("model_channels: many", "model_channels: Input should be a valid integer"),
        ("model: {params: {unet_config: 3}}", "Input should be a valid dictionary"),
        ("[", "is neither JSON nor YAML"),
    ],
)
def test_arguments_that_cannot_be_converted_are_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UnusableModel, match=rf"config\.yaml.*{told}"):
        read_arguments(path)


def test_the_command_converts_and_says_what_is_missing(weights: Tensors, config_file: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "unet_mg.pt", tmp_path / "out"
    torch.save(weights, source)
    out.mkdir()
    command = ["convert", str(source), str(out), "--config", str(config_file), "--fps", "16"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert all(part in result.stdout for part in ("vae/", "text_encoder/", "tokenizer/", "stable-diffusion-2-1"))
    assert read_json(out / "conversion.json", Conversion).fps == 16
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2
    assert "out exists already; name a new or an empty folder" in again.stderr


def test_a_refused_checkpoint_leaves_nothing(weights: Tensors, tmp_path: Path) -> None:
    source = tmp_path / "unet.safetensors"
    save_file(weights, source)
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out")])  # the public model's arguments
    assert result.exit_code == 2
    assert "weights and configuration disagree" in result.stderr
    assert list(tmp_path.iterdir()) == [source]
