"""VAE decoders as units: bypass, removal, what is refused; a compressed VAE reloads where the stock one lay."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, AutoencoderTiny, StableVideoDiffusionPipeline

from tests.models.tiny_vaes import CAUSAL, CLASSES, FRAME, TEMPORAL, latents_of, new_decoder, new_vae
from tests.tiny import new_inputs
from vdmini_core.artifacts import folder_digest
from vdmini_core.models import IllegalPlan, UnusableModel, load_pipeline
from vdmini_core.models.decoder import VAEDecoder, load_vae
from vdmini_core.models.decoder_rows import VAES
from vdmini_core.models.export import export_pipeline
from vdmini_core.models.vae_facts import vae_facts
from vdmini_core.pruning.decoder_channels import decoder_channels
from vdmini_core.pruning.surgery import save_model

REMOVABLE = {
    TEMPORAL: ("M", "U.0.0", "U.0.1", "U.0.2", "U.1.0", "U.1.1", "U.1.2", "U.2.1", "U.2.2"),
    FRAME: ("M", "U.0.0", "U.0.1", "U.1.0", "U.1.1", "U.2.1"),
    CAUSAL: ("M", "U.0.0", "U.0.1", "U.1.1", "U.2.0", "U.2.1"),
}


def small(name: str) -> VAEDecoder:
    """Without mid block and one layer of the last block, and half of the other channels of the higher resolutions."""
    return decoder_channels(new_decoder(name).without(["M", "U.2.1"])).narrowed((1.0, 0.5, 0.5))


def test_every_class_of_the_table_is_tested() -> None:
    assert tuple(row.stock.__name__ for row in VAES) == CLASSES


@pytest.mark.parametrize("name", CLASSES)
def test_units_whose_width_stays_can_go(name: str) -> None:
    decoder = new_decoder(name)
    assert decoder.removable == REMOVABLE[name]
    stay = [unit.name for unit in decoder.units if unit.name not in decoder.removable]
    assert stay == [unit.name for unit in decoder.units if len(set(decoder.widths_through(unit))) == 2]


@pytest.mark.parametrize("name", CLASSES)
def test_a_bypass_of_everything_that_can_go_is_its_removal(name: str) -> None:
    decoder, latents = new_decoder(name), latents_of()
    before = decoder(latents)
    with decoder.bypass(decoder.removable):
        bypassed = decoder(latents)
    small = decoder.without(decoder.removable)
    torch.testing.assert_close(small(latents), bypassed, rtol=0, atol=1e-6)
    assert not torch.allclose(bypassed, before, atol=1e-2)
    assert torch.equal(decoder(latents), before)
    assert [unit.name for unit in small.units] == [
        f"U.{unit.name.split('.')[1]}.0" for unit in decoder.units if unit.name not in decoder.removable
    ]


@pytest.mark.parametrize("name", CLASSES)
def test_removal_in_two_steps_is_that_in_one(name: str) -> None:
    decoder, latents = new_decoder(name), latents_of()
    twice = decoder.without(["U.0.0"]).without(["M", "U.0.0"])
    once = decoder.without(["M", "U.0.0", "U.0.1"])
    assert twice.model.config["removed_units"] == ["M", "U.0.0", "U.0.1"]
    assert torch.equal(twice(latents), once(latents))


@pytest.mark.parametrize("name", [TEMPORAL, FRAME])
def test_a_unit_between_two_widths_is_refused_with_the_reason(name: str) -> None:
    reason = r"removing U\.2\.0 takes out U\.2\.0, which changes the width 64 -> 32; remove U\.2\.1"
    with pytest.raises(IllegalPlan, match=reason):
        new_decoder(name).without(["U.2.0"])
    with pytest.raises(IllegalPlan, match=reason), new_decoder(name).bypass(["U.2.0"]):
        pass


def test_unknown_units_lost_channels_and_other_vaes_are_refused() -> None:
    with pytest.raises(IllegalPlan, match=r"there is no unit U\.9\.0; the units are"):
        new_decoder(FRAME).without(["U.9.0"])
    with pytest.raises(IllegalPlan, match="has lost channels already"):
        small(FRAME).without(["U.0.0"])
    with pytest.raises(IllegalPlan, match="AutoencoderTiny is no VAE whose decoder"):
        VAEDecoder(AutoencoderTiny(encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4))
    wan22 = AutoencoderKLWan.from_config({"base_dim": 8, "z_dim": 4, "is_residual": True, "patch_size": 2})
    with pytest.raises(IllegalPlan, match="its shortcuts repeat channels"):
        VAEDecoder(wan22)


@pytest.mark.parametrize("name", CLASSES)
def test_the_encoder_is_the_stock_one_bit_for_bit(name: str) -> None:
    stock, found = new_vae(name).state_dict(), small(name).model.state_dict()
    others = [key for key in stock if not key.startswith("decoder.")]
    assert len(others) > 10
    assert all(torch.equal(found[key], stock[key]) for key in others)
    assert vae_facts({**found_config(name), "_class_name": f"VDMini{name}"}) == vae_facts(
        {**found_config(name), "_class_name": name}
    )


def found_config(name: str) -> dict[str, object]:
    return dict(new_vae(name).config)


RELOAD = """
import json, sys, importlib
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
module = importlib.import_module("vdmini_core.models.decoder")
for folder in sorted(Path(sys.argv[1]).iterdir()):
    cls = getattr(module, json.loads((folder / "vae/config.json").read_text())["_class_name"])
    model, info = cls.from_pretrained(folder / "vae", output_loading_info=True, use_safetensors=True)
    wrong = [info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs") if info[key]]
    latents, clips = torch.load(folder / "call.pt", weights_only=True)
    with torch.no_grad():
        worst = (module.decoded(model.eval(), latents) - clips).abs().max().item()
    print(json.dumps([folder.name, wrong, worst]))
"""


def test_saved_decoders_answer_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    for name in CLASSES:
        decoder = small(name)
        save_model(decoder, tmp_path / name / "vae")
        torch.save((latents_of(), decoder(latents_of())), tmp_path / name / "call.pt")
    command = [sys.executable, "-c", RELOAD, str(tmp_path), str(Path(__file__).parents[2])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == sorted(CLASSES)
    assert all(row[1] == [] and row[2] <= 1e-6 for row in rows), rows


def test_a_pipeline_folder_loads_a_compressed_vae_where_the_stock_one_lay(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    teacher = load_pipeline(tiny_pipeline_folder, ("vae",))
    compressed = VAEDecoder(teacher.vae).without(["M"])
    save_model(compressed, tmp_path / "vae")
    folder = export_pipeline(
        tiny_pipeline_folder, tiny_pipeline_folder / "unet", tmp_path / "out", vae=tmp_path / "vae"
    )
    latents = new_inputs(1, size=8)[0]
    ours = load_pipeline(folder, ("vae",))
    torch.testing.assert_close(ours.decode(latents), compressed(latents).clamp(-1, 1), rtol=0, atol=1e-6)
    assert folder_digest(folder / "unet") == folder_digest(tiny_pipeline_folder / "unet")

    stock = StableVideoDiffusionPipeline.from_pretrained(folder)
    assert type(stock.vae).__name__ == "VDMiniAutoencoderKLTemporalDecoder"
    with torch.no_grad():
        expected = stock.decode_latents(latents.transpose(1, 2), 4, 4).clamp(-1, 1)
    torch.testing.assert_close(ours.decode(latents), expected, rtol=1e-4, atol=1e-5)


def test_a_vae_of_another_class_is_refused_by_name(tmp_path: Path) -> None:
    save_model(new_decoder(FRAME), tmp_path / "vae")
    with pytest.raises(
        UnusableModel, match="'AutoencoderKL'; expected one of AutoencoderKLWan, VDMiniAutoencoderKLWan"
    ):
        load_vae(AutoencoderKLWan, tmp_path / "vae")
