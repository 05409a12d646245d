"""Two processes on one machine: the same gradients and the same latent statistics as one process on all the data.

All that needs two processes runs once, in `in_two`, and each test looks at one of its results.
"""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from psvae import PSVAE, fit_latent_statistics
from psvae.errors import CheckpointError
from tests.processes import in_processes
from tests.stages import forward, frozen_encoder, move_off_the_frozen_copy, prepare, total
from tests.tiny import fill_weights, images, tiny_psvae

STAGES, PER_PROCESS = (1, 2), 2
SHARES = (5, 19)  # images per process for the statistics
Gradients = dict[str, Tensor]


def model_for(stage: int) -> tuple[PSVAE, Any]:
    """A model ready to be trained, and the frozen copy of its encoder."""
    model = fill_weights(tiny_psvae()).train()
    frozen = frozen_encoder(model)
    return prepare(move_off_the_frozen_copy(model), stage), frozen


def gradients(model: Any, forward_through: Any, frozen: Any, stage: int, first: int, count: int) -> Gradients:
    """Of the parameters of ``model``, after one backward on images ``first`` to ``first + count``."""
    pixels = images(2 * PER_PROCESS)[first : first + count]
    total(forward(forward_through, pixels, stage, first), pixels, frozen, stage).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: whole(gradient) for name, gradient in found.items()}


def whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def under_ddp(rank: int, stage: int, through_the_wrapper: bool = True) -> Gradients:
    model, frozen = model_for(stage)
    wrapper = DistributedDataParallel(model)
    return gradients(model, wrapper if through_the_wrapper else model, frozen, stage, rank * PER_PROCESS, PER_PROCESS)


def under_fsdp(rank: int, stage: int) -> Gradients:
    model, frozen = model_for(stage)
    return gradients(shard(model), model, frozen, stage, rank * PER_PROCESS, PER_PROCESS)


def shard(model: PSVAE) -> PSVAE:
    """Blocks, halves and modules sharded, as a user's auto-wrap would; the names stay those of the module."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    assert model.vae is not None
    halves = [model.vae.encoder, model.vae.decoder]
    blocks = itertools.chain(model.encoder.vit.blocks, *(half.blocks for half in halves))
    for part in (*blocks, model.encoder, *halves, model.decoder, model):
        fully_shard(part, mesh=mesh)
    return model


def saved_while_sharded() -> str:
    try:
        shard(tiny_psvae()).save_pretrained("never-made")
    except CheckpointError as error:
        return str(error)
    return "saved"


def statistics(rank: int) -> list[Tensor]:
    """Mean and std after one fit on this process's share, and after a second with other batches."""
    share = varied_images().split(SHARES)[rank]
    vae = tiny_psvae()
    first = [tensor.clone() for tensor in fit_latent_statistics(vae, share.split(3))]
    return [*first, *fit_latent_statistics(vae, share.split(2))]


def statistics_of_one_process(rank: int) -> list[Tensor]:
    """The other process has no data at all."""
    return list(fit_latent_statistics(tiny_psvae(), [varied_images()] if rank == 1 else []))


def varied_images() -> Tensor:
    """Images that differ in contrast, so that the two shares have other statistics than the whole."""
    return images(sum(SHARES)) * torch.linspace(0.1, 1.0, sum(SHARES)).view(-1, 1, 1, 1)


def all_of_it(rank: int) -> dict[str, Any]:
    """What one of the two processes does."""
    results: dict[str, Any] = {"statistics": statistics(rank), "one process": statistics_of_one_process(rank)}
    for stage in STAGES:
        results[f"ddp {stage}"] = under_ddp(rank, stage)
        results[f"beside ddp {stage}"] = under_ddp(rank, stage, through_the_wrapper=False)
    try:
        for stage in STAGES:
            results[f"fsdp {stage}"] = under_fsdp(rank, stage)
        results["saved while sharded"] = saved_while_sharded()
    except (RuntimeError, NotImplementedError) as error:  # both processes stop at the same call
        results["no fsdp"] = f"{type(error).__name__}: {error}"
    return results


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of both processes."""
    return in_processes(all_of_it, tmp_path_factory.mktemp("processes"))


def in_one(stage: int) -> Gradients:
    """The gradients of one process on the joined batch."""
    model, frozen = model_for(stage)
    return gradients(model, model, frozen, stage, 0, 2 * PER_PROCESS)


def difference(got: Gradients, wanted: Gradients) -> float:
    """The largest, over parameters, of ‖got − wanted‖ / ‖wanted‖."""
    assert got.keys() == wanted.keys()
    return max(float((got[name] - wanted[name]).norm() / (wanted[name].norm() + 1e-4)) for name in wanted)


@pytest.mark.parametrize("stage", STAGES)
def test_ddp_gives_the_gradients_of_the_joined_batch(in_two: list[dict[str, Any]], stage: int) -> None:
    wanted = in_one(stage)
    assert any(name.startswith("encoder.") for name in wanted) == (stage == 2)
    for result in in_two:
        assert difference(result[f"ddp {stage}"], wanted) < 1e-3
    assert difference(in_two[0][f"ddp {stage}"], in_two[1][f"ddp {stage}"]) == 0.0


@pytest.mark.parametrize("stage", STAGES)
def test_each_process_alone_gives_other_gradients(in_two: list[dict[str, Any]], stage: int) -> None:
    """The comparison above can fail: calls beside the wrapper are not synchronised."""
    for result in in_two:
        assert difference(result[f"beside ddp {stage}"], in_one(stage)) > 0.05


@pytest.mark.parametrize("stage", STAGES)
def test_fsdp_gives_the_gradients_of_the_joined_batch(in_two: list[dict[str, Any]], stage: int) -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        pytest.skip("sharding over gloo on the CPU gave other gradients in PyTorch 2.7")
    if "no fsdp" in in_two[0]:
        pytest.skip(f"this PyTorch cannot shard over gloo on the CPU: {in_two[0]['no fsdp']}")
    for result in in_two:
        assert difference(result[f"fsdp {stage}"], in_one(stage)) < 1e-3


def test_saving_sharded_weights_says_how_to_gather_them(in_two: list[dict[str, Any]]) -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        pytest.skip("sharding over gloo on the CPU gave other gradients in PyTorch 2.7")
    if "no fsdp" in in_two[0]:
        pytest.skip(f"this PyTorch cannot shard over gloo on the CPU: {in_two[0]['no fsdp']}")
    for result in in_two:
        assert "tensors are sharded over processes; wanted whole ones" in result["saved while sharded"]
        assert "get_model_state_dict, with full_state_dict=True" in result["saved while sharded"]


def test_two_processes_fit_the_statistics_of_the_union(in_two: list[dict[str, Any]]) -> None:
    """Unequal numbers of batches and of images; fitting again changes nothing."""
    vae = tiny_psvae()
    mean, std = fit_latent_statistics(vae, [varied_images()])
    for mean_1, std_1, mean_2, std_2 in (result["statistics"] for result in in_two):
        assert torch.allclose(mean_1, mean, atol=1e-6)
        assert torch.allclose(std_1, std, rtol=1e-5)
        assert torch.allclose(mean_2, mean, atol=1e-6)
        assert torch.allclose(std_2, std, rtol=1e-5)
    pairs = zip(*(result["statistics"] for result in in_two), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    alone = copy.deepcopy(vae)
    fit_latent_statistics(alone, [varied_images()[: SHARES[0]]])
    assert not torch.allclose(alone.latent_spec.std, std, rtol=1e-3), "the shares must differ for this to say anything"


def test_a_process_without_data_gets_the_statistics_of_the_others(in_two: list[dict[str, Any]]) -> None:
    mean, std = fit_latent_statistics(tiny_psvae(), [varied_images()])
    for result in in_two:
        assert torch.allclose(result["one process"][0], mean, atol=1e-6)
        assert torch.allclose(result["one process"][1], std, rtol=1e-5)
