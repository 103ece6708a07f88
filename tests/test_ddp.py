"""What DDP is brought to before the first step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from configs.arguments import make_config
from configs.errors import ConfigError
from tests import bn_net
from tests.tiny import TinyNet
from trainer.base_trainer import BaseTrainer
from trainer.ddp import ddp_options, settle_buckets, with_synced_norms


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_buckets_are_settled_without_a_trace(one_process, on_a_gpu):
    model = DistributedDataParallel(TinyNet())
    if on_a_gpu:  # what DDP does with its arguments there
        model.device_ids, model.device_type = [0], "cpu"
    order = []

    def noted(group, bucket):
        order.append([weight.shape for weight in bucket.parameters()])
        return allreduce_hook(group, bucket)

    model.register_comm_hook(None, noted)
    module, before = model.module, {name: weight.clone() for name, weight in model.named_parameters()}
    settle_buckets(model)
    assert model.module is module
    assert all(weight.grad is None and torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    images, alone = torch.ones(2, 1, 6, 6), TinyNet()
    for net in (model, model, alone, alone):
        net(images).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), alone.parameters()))
    first, *later = order
    assert len(later) == 2 and later[0] == later[1] != first


def test_what_is_not_ddp_has_no_buckets():
    settle_buckets(nn.Linear(2, 2))


def test_a_forward_waits_for_other_processes_where_they_share_weights_buffers_or_statistics():
    def waits(sharded=False, broadcast_buffers=False, **options) -> bool:
        model = SimpleNamespace(broadcast_buffers=broadcast_buffers)
        trainer: Any = SimpleNamespace(sharded=sharded, config=make_config(**options), model=model)
        return BaseTrainer.computes_in_step.fget(trainer)  # type: ignore[attr-defined]

    assert not waits()
    assert waits(sharded=True) and waits(broadcast_buffers=True) and waits(sync_batch_norm=True)


def test_buffers_are_sent_around_only_where_more_than_batch_norm_changes_them():
    net = bn_net.BatchNormNet(num_classes=3, in_channels=1)
    assert not ddp_options(make_config(), net).broadcast_buffers
    net.register_buffer("codes", torch.zeros(4))
    assert ddp_options(make_config(), net).broadcast_buffers
    assert ddp_options(make_config(find_unused_parameters=True), net).find_unused_parameters


def test_synced_batch_norm_is_refused_without_a_gpu():
    with pytest.raises(ConfigError, match="--sync_batch_norm needs GPUs, and the device is cpu"):
        with_synced_norms(bn_net.BatchNormNet(num_classes=3), torch.device("cpu"))
    synced = with_synced_norms(bn_net.BatchNormNet(num_classes=3), torch.device("cuda"))  # nothing is computed
    assert sum(isinstance(module, torch.nn.SyncBatchNorm) for module in synced.modules()) == 2
