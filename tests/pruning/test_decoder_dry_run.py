"""`vdmini decoder`: published decoders without weights, and what it says of others."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_svds_decoder_becomes_the_papers() -> None:
    result = CliRunner().invoke(app, ["decoder", "svd-xt", "--frames", "2", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["plan"]["parameters"][0] == 63_579_183
    assert found["plan"]["parameters"][1] == pytest.approx(39.2e6, rel=0.01)
    assert (found["clip_shape"], found["latent_shape"]) == ([2, 576, 1024], [4, 2, 72, 128])
    parts = {part["name"]: part for part in found["parts"]}
    assert "width 256 -> 128" in parts["U.3.0"]["stays"]
    assert sum(part["parameters"] for part in parts.values()) == 63_579_183


@pytest.mark.parametrize(
    ("source", "total"), [("t2v-turbo-v2", 49_490_179), ("wan-2.1-1.3b", 73_295_331), ("zoo:i2v-shapes", 650_600)]
)
def test_every_class_has_a_published_decoder(source: str, total: int) -> None:
    size = ["--frames", "1" if source.startswith("wan") else "2", "--height", "64", "--width", "64"]
    result = CliRunner().invoke(app, ["decoder", source, *size, "--json"])
    assert result.exit_code == 0, result.output
    parameters = json.loads(result.stdout)["plan"]["parameters"]
    assert parameters[0] == total
    assert parameters[1] == pytest.approx(39.17 / 63.58 * total, rel=0.03)


def test_an_own_plan_is_printed_and_an_illegal_one_refused() -> None:
    small = ["--frames", "2", "--height", "16", "--width", "16"]
    own = ["--remove", "M", "--share", "1", "--share", "1", "--share", ".5"]
    result = CliRunner().invoke(app, ["decoder", "zoo:i2v-shapes", *small, *own])
    assert result.exit_code == 0, result.output
    assert "- left: no mid, up blocks 2 x 64, 2 x 64, 2 x 16" in result.stdout
    refused = CliRunner().invoke(app, ["decoder", "zoo:i2v-shapes", *small, "--remove", "U.2.0"])
    assert refused.exit_code == 2
    assert "changes the width 64 -> 32; remove U.2.1 instead" in " ".join(refused.stderr.split())


def test_a_model_whose_vae_is_not_known_is_refused() -> None:
    refused = CliRunner().invoke(app, ["decoder", "mochi"])
    assert refused.exit_code == 2
    assert "no config of the VAE of 'mochi' ships with VDMini" in " ".join(refused.stderr.split())
