"""Tiny networks and a whole tiny pipeline folder for every test."""

from pathlib import Path

import pytest
from torch import Tensor

from tests import tiny
from vdmini_core.models import SVD, Condition, UNetDenoiser, load_pipeline


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--slow` runs the tests that take minutes, too."""
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes unless it is asked for."""
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


@pytest.fixture
def tiny_unet() -> UNetDenoiser:
    """A fresh random U-Net of equal widths, so that most removals are legal."""
    return tiny.new_unet(tiny.EVEN)


@pytest.fixture
def growing_unet() -> UNetDenoiser:
    """A fresh random U-Net whose width changes between stages, as SVD's does."""
    return tiny.new_unet(tiny.GROWING)


@pytest.fixture
def inputs() -> tuple[Tensor, Condition]:
    """Latents [1, 4, 4, 16, 16] and their condition."""
    return tiny.new_inputs()


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole SVD pipeline folder on disk; read only."""
    return tiny.write_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_pipeline_folder: Path) -> SVD:
    """The pipeline of `tiny_pipeline_folder`, loaded once; leave its weights as they are."""
    return load_pipeline(tiny_pipeline_folder)
