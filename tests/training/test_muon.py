"""Muon for matrices beside AdamW for the rest: its updates, its state, and its work shared by processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vdmini_core.settings import LoopSettings
from vdmini_core.training.muon import Muon, muon, orthogonal
from vdmini_core.training.player import Player, restore, snapshot

SETTINGS = LoopSettings(max_steps=8, batch_size=4, precision="fp32")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))


def moved(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """The losses of these steps, each with clips of its own."""
    losses = []
    for step in steps:
        inputs = torch.randn(256, 48, generator=torch.Generator().manual_seed(step))
        loss = (module(inputs) - inputs[:, :32].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


@pytest.mark.parametrize("shape", [(40, 40), (40, 120), (120, 40), (3, 64, 32)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonal(matrices)
    values = torch.linalg.svdvals(found)
    assert found.shape == shape
    assert (values.min() > 0.3, values.max() < 1.3) == (True, True)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.nn.functional.cosine_similarity((u @ v).flatten(), found.flatten(), dim=0) > 0.97


def test_an_update_of_a_matrix_has_adams_size_and_the_rest_is_adams() -> None:
    module, other = network(), network()
    optimizer = Muon(module.parameters(), 1e-2, (0.9, 0.99), 0.0)
    moved(module, optimizer, range(1))
    moved(other, torch.optim.AdamW(other.parameters(), 1e-2, (0.9, 0.99), weight_decay=0.0), range(1))
    for (name, one), two, start in zip(
        module.named_parameters(), other.parameters(), network().parameters(), strict=True
    ):
        if one.ndim == 2:
            assert (one - start).square().mean().sqrt().item() == pytest.approx(0.2e-2, rel=0.25), name
        else:
            torch.testing.assert_close(one, two)


def test_it_learns_and_goes_on_from_a_checkpoint_bit_by_bit(tmp_path: Path) -> None:
    def player() -> Player:
        made = Player("one", network(), lambda state: {}, 1e-2, muon)
        made.begin(SETTINGS, torch.device("cpu"))
        return made

    whole, first, second = player(), player(), player()
    losses = moved(whole.module, whole.optimizer, range(60))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    moved(first.module, first.optimizer, range(30))
    save_file({k: v.contiguous() for k, v in snapshot([first]).items()}, tmp_path / "state.safetensors")
    restore([second], load_file(tmp_path / "state.safetensors"))
    assert moved(second.module, second.optimizer, range(30, 60)) == losses[30:]
    assert torch.equal(weights(second.module), weights(whole.module))


def share(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    module = network()
    moved(module, Muon(module.parameters(), 1e-2, (0.9, 0.99), 0.1), range(4))
    torch.save(weights(module), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes_that_share_the_work_get_what_one_gets(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(share, (tmp_path,), nprocs=2)
    module = network()
    moved(module, Muon(module.parameters(), 1e-2, (0.9, 0.99), 0.1), range(4))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), weights(module), rtol=1e-5, atol=1e-6)
