"""Weight files are read only if they are the ones that were asked for."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.evaluation.ucf_tiny import Classifier, Projection, save_script
from vdmini_core.artifacts import file_digest
from vdmini_core.evaluation.extractor import I3D_CALL, WrongWeights, load_extractor, weight_file


class Wants(nn.Module):
    def forward(self, x: Tensor, dropout: float) -> Tensor:
        return x.flatten(1) * dropout


class Scalar(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


class Infinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] / 0


def test_an_extractor_is_called_as_it_wants_to_be(tmp_path: Path) -> None:
    videos = torch.randint(0, 256, (2, 3, 4, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    i3d = load_extractor(*save_script(tmp_path / "i3d.pt", Projection()), tmp_path)
    assert i3d.call == I3D_CALL
    assert torch.equal(i3d(videos), Projection()(videos, rescale=True, resize=True, return_features=True))
    c3d = load_extractor(*save_script(tmp_path / "c3d.pt", Classifier()), tmp_path)
    assert c3d.call == {}
    assert torch.allclose(c3d(videos).sum(1), torch.ones(2, dtype=torch.float64))


def test_a_file_with_another_digest_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sha256 = save_script(tmp_path / "i3d.pt", Projection())
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(WrongWeights, match=f"has the sha256 {sha256}, not {'0' * 64}; it was not loaded"):
        load_extractor(path, "0" * 64, tmp_path)
    with pytest.raises(WrongWeights, match="'abc' is no sha256; expected 64 hexadecimal digits"):
        load_extractor(path, "abc", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist; give the path or the URL"):
        load_extractor(str(tmp_path / "none.pt"), sha256, tmp_path)


def test_a_url_is_downloaded_once_and_checked(tmp_path: Path) -> None:
    path, sha256 = save_script(tmp_path / "i3d.pt", Projection())
    url = Path(path).as_uri()
    with pytest.raises(WrongWeights, match="it was not kept"):
        weight_file(url, "0" * 64, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    kept = weight_file(url, sha256.upper(), tmp_path / "cache")
    Path(path).unlink()
    assert weight_file(url, sha256, tmp_path / "cache") == kept == tmp_path / "cache" / f"{sha256}.pt"
    with pytest.raises(ValueError, match="cannot be downloaded"):
        weight_file(url, "1" * 64, tmp_path / "cache")


def test_what_is_no_extractor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongWeights, match=r"wants dropout; extractors are called with videos and rescale, resize"):
        load_extractor(*save_script(tmp_path / "a.pt", Wants()), tmp_path)
    videos = torch.zeros(2, 3, 4, 8, 8)
    with pytest.raises(ValueError, match=r"b\.pt: expected features \[2, D\], a vector a video, got "):
        load_extractor(*save_script(tmp_path / "b.pt", Scalar()), tmp_path)(videos)
    with pytest.raises(ValueError, match=r"c\.pt answered with NaN or infinity"):
        load_extractor(*save_script(tmp_path / "c.pt", Infinite()), tmp_path)(videos)
    (tmp_path / "d.pt").write_bytes(b"no zip")
    with pytest.raises(WrongWeights, match=r"d\.pt is no TorchScript file"):
        load_extractor(str(tmp_path / "d.pt"), file_digest(tmp_path / "d.pt"), tmp_path)
