"""What only a GPU can show: `pytest -m gpu`. Where there is none, the reason why these are skipped is told."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from configs.arguments import make_config
from configs.errors import Diverged
from data.dataset import load_data
from data.loader import train_loader
from models.model import build
from models.recompute import recompute_blocks
from models.summary import cost
from scripts import session
from scripts.report import told
from scripts.wiring import build_data, build_model, build_trainer
from tests.conftest import FSDP, ROOT, lines_of, run_script, same_run
from tests.test_nonfinite import BAD_STEP, BatchNormNet, batches_with, by_hand, trainer_of
from tests.test_scale import check_alike
from tests.tiny import TinyNet, distance, tiny_batches, tiny_trainer, weights
from trainer import checkpoint, mfu, micro_batch
from trainer.device import make_accelerator, moved_ahead
from trainer.main_trainer import MainTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is at hand"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA GPUs are at hand")
PLAIN = {"batch_size": 8, "lr": 0.1, "optimizer": "sgd"}


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    """An Accelerator for each test, float32 that is no tf32, and afterwards all as it was."""
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.backends.cudnn.allow_tf32 = allowed
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()


# ---- the same numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [TinyNet, BatchNormNet])
@pytest.mark.parametrize("options", [{}, {"mixup": 0.2, "cutmix": 1.0, "grad_clip": 0.1, "ema_decay": 0.9}])
def test_a_step_is_that_of_the_cpu(tmp_path, monkeypatch, model, options):
    batches = tiny_batches([8])
    gpu = tiny_trainer(tmp_path, batches, model=model(), **PLAIN, **options)
    assert gpu.device.type == "cuda"
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    cpu = tiny_trainer(tmp_path, batches, model=model(), **PLAIN, **options)
    assert cpu.device.type == "cpu"
    start = weights(cpu).clone()
    losses = [trainer.train_epoch(batches)["loss"] for trainer in (gpu, cpu)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert distance(weights(cpu), start) > 1e-3
    assert distance(weights(gpu).cpu(), weights(cpu)) < 1e-5
    assert gpu.validate_epoch(batches) == pytest.approx(cpu.validate_epoch(batches), rel=1e-5)


class Seen(MainTrainer):
    """Notes the dtypes of what the body, the model and the loss give."""

    def forward_pass(self, batch):
        losses, predictions = super().forward_pass(batch)
        self.dtypes = losses.dtype, predictions.dtype
        return losses, predictions


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_learns_with_outputs_and_losses_in_float32(tmp_path, precision, dtype):
    batches, inside = tiny_batches([16]), set()
    options = {"batch_size": 16, "lr": 0.05, "epochs": 150, "mixed_precision": precision}
    trainer = tiny_trainer(tmp_path, batches, batches, trainer=Seen, **options)
    trainer.plain_model.body.register_forward_hook(lambda module, inputs, output: inside.add(output.dtype))
    assert trainer.train()["best"]["value"] == 1.0
    assert trainer.dtypes == (torch.float32, torch.float32)
    assert inside == {dtype}
    assert (trainer.scaler is not None) == (precision == "fp16")


@pytest.mark.parametrize("options", [{"channels_last": True}, {"channels_last": True, "compile": True}])
def test_channels_last_and_compile_change_speed_alone(tmp_path, options):
    batches = tiny_batches([8] * 4)
    for name, given in (("plain", {}), ("fast", options)):
        run = {**PLAIN, "lr": 0.01, "log_every": 1, "experiment_name": name, **given}
        tiny_trainer(tmp_path, batches, batches, model=BatchNormNet(), **run).train()
    plain, fast = (lines_of(tmp_path / name, "train", "val") for name in ("plain", "fast"))
    assert [line["loss"] for line in fast] == pytest.approx([line["loss"] for line in plain], rel=1e-3)
    files = [checkpoint.all_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("plain", "fast")]
    assert load_file(files[0] / "model.safetensors").keys() == load_file(files[1] / "model.safetensors").keys()


def test_what_travels_ahead_on_its_own_stream_arrives_whole(tmp_path):
    """While the device computes, so that a batch that is used too early would not be there."""
    config = make_config(batch_size=64, num_workers=2)
    loader, trainer = train_loader(config, load_data(config)), tiny_trainer(tmp_path, tiny_batches([8]), **PLAIN)
    loader.set_position(0, 0)
    expected = list(loader)
    assert all(batch["images_BCHW"].is_pinned() for batch in expected)
    busy, sums = torch.randn(2048, 2048, device=trainer.device), []
    loader.set_position(0, 0)
    for batch in moved_ahead(loader, trainer.device, trainer.on_device):
        busy = (busy @ busy).tanh()
        sums.append({name: tensor.double().sum((*range(1, tensor.ndim),)) for name, tensor in batch.items()})
    assert len(sums) == len(expected)
    for found, batch in zip(sums, expected):
        for name, tensor in batch.items():
            assert torch.equal(found[name].cpu(), tensor.double().sum((*range(1, tensor.ndim),))), name


# ---- coming back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path, precision):
    """With fp16 also the scale of the loss, which here grows every three steps."""
    options = {**PLAIN, "momentum": 0.9, "ema_decay": 0.9, "deterministic": True, "mixed_precision": precision}
    trainers = []
    for name, stop in (("whole", None), ("parts", 7), ("parts", None)):
        run = {**options, "experiment_name": name, "log_every": 1, "stop_after_steps": stop}
        trainers.append(tiny_trainer(tmp_path, tiny_batches([8] * 12), model=BatchNormNet(), **run))
        if trainers[-1].scaler is not None:
            trainers[-1].scaler.set_growth_interval(3)
        trainers[-1].train()
    whole, _, resumed = trainers
    assert torch.equal(weights(whole), weights(resumed))
    assert lines_of(whole.run.path) == lines_of(resumed.run.path)
    if precision == "fp16":
        assert whole.scaler.get_scale() != 65536
        assert whole.scaler.state_dict() == resumed.scaler.state_dict()


def test_a_real_run_goes_on_in_a_fresh_process_to_the_last_bit(tmp_path):
    flags = (
        "--epochs 1 --batch_size 96 --micro_batch_size 32 --mixup 0.2 --cutmix 1.0 --ema_decay 0.99 --grad_clip "
        "--warmup_steps 5 --trace_samples --mixed_precision bf16 --channels_last --deterministic --cpu_threads 1"
    ).split()
    for name, more, rc in (("whole", [], 0), ("parts", ["--stop_after_steps", "6"], 75), ("parts", [], 0)):
        run_script("train.py", "--output_dir", tmp_path, "--experiment_name", name, *flags, *more, rc=rc)
    same_run(tmp_path / "whole", tmp_path / "parts")


# ---- losses and gradients that are not finite -------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "steps"),
    [("stop", [1, 2, 3, 4, 5, 7, 8]), ("skip", [1, 2, 3, 4, 5, 7, 8, 9, 10]), ("rollback", [1, 2, 3, 4, 9, 10])],
)
def test_what_is_not_finite_moves_no_weight_before_the_host_looks(tmp_path, policy, steps):
    """It looks at log lines: BAD_STEP is 6, the next line that of step 8, the last checkpoint that of step 4."""
    trainer = trainer_of(tmp_path, math.nan, nonfinite=policy)
    assert not trainer.nonfinite.looks_at_once
    if policy == "stop":
        with pytest.raises(Diverged, match=f"at step {BAD_STEP} "):
            trainer.train()
    else:
        trainer.train()
        assert lines_of(trainer.run.path, "nonfinite")[0]["step"] == BAD_STEP
    torch.testing.assert_close(weights(trainer).cpu(), by_hand(steps), rtol=1e-4, atol=1e-5)


def test_running_statistics_and_their_averages_are_put_back(tmp_path):
    options = {**PLAIN, "batch_size": 4, "nonfinite": "skip", "ema_decay": 0.9, "log_every": 4}
    trainer = tiny_trainer(tmp_path, batches_with(math.nan), model=BatchNormNet(), **options)
    assert trainer.train()["state"] == "done"
    assert trainer.state.nonfinite_steps == 1
    for folder in checkpoint.all_checkpoints(trainer.run.checkpoints):
        for file in ("model.safetensors", "ema.safetensors"):
            assert all(
                value.isfinite().all() for value in load_file(folder / file).values() if value.is_floating_point()
            )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_gradient_too_large_for_fp16_lowers_the_scale_and_moves_nothing(tmp_path, optimizer):
    options = {**PLAIN, "optimizer": optimizer, "mixed_precision": "fp16", "log_every": 1}
    trainer = tiny_trainer(tmp_path, tiny_batches([8]), **options)
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**40})
    start = weights(trainer).clone()
    assert trainer.train()["state"] == "done"
    assert torch.equal(weights(trainer), start)
    assert trainer.scaler.get_scale() == 2.0**39
    assert trainer.state.nonfinite_steps == 0
    for state in trainer.optimizers[0].state.values():
        assert all(not value.any() for value in state.values()), state.keys()


# ---- memory -----------------------------------------------------------------------------------------------


def test_computing_twice_needs_less_memory_for_the_same_loss(tmp_path):
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(64, 3, 128, 128, generator=generator), torch.arange(64) % 10)]
    options = {**PLAIN, "batch_size": 64, "lr": 0.01, "deterministic": True}
    losses, peaks = [], []
    for twice in (False, True):
        torch.manual_seed(0)
        model = build("resnet18", num_classes=10, in_channels=3, image_size=128, dropout=None)
        model.classes = [str(number) for number in range(10)]
        if twice:
            recompute_blocks(model)
        trainer = tiny_trainer(tmp_path, batches * 2, model=model, **options)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses.append(trainer.train_epoch(batches * 2)["loss"])
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del trainer, model
    assert losses[0] == losses[1]
    assert peaks[1] < 0.8 * peaks[0]


@pytest.fixture
def small_memory():
    """1.5 GB more than this process has in use."""
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 1.5e9) / total))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_largest_micro_batch_that_fits_trains_and_a_larger_one_is_told_of(tmp_path, small_memory):
    images = 3, 64, 64
    config = make_config(batch_size=4096, output_dir=str(tmp_path))
    model = build("resnet18", num_classes=10, in_channels=3, image_size=64, dropout=None)
    model.classes = [str(number) for number in range(10)]
    found = micro_batch.found_or_recorded(config, model, images, make_accelerator(config))
    assert 8 <= found < 4096
    batches = [(torch.zeros(found, *images), torch.zeros(found, dtype=torch.int64))] * 2
    trainer = tiny_trainer(tmp_path, batches, model=model, batch_size=found)
    trainer.train_epoch(batches)
    assert trainer.state.step == 2
    large = [(torch.zeros(8 * found, *images), torch.zeros(8 * found, dtype=torch.int64))]
    with pytest.raises(torch.OutOfMemoryError) as error:
        tiny_trainer(tmp_path, large, model=model, batch_size=8 * found).train_epoch(large)
    assert told(error.value).what.startswith("out of memory: ")
    assert "--micro_batch_size" in told(error.value).fix


# ---- speed ------------------------------------------------------------------------------------------------


def watched(task: type[MainTrainer]) -> type[MainTrainer]:
    """The task's trainer, for which it is an error to wait for the device between two log lines."""

    class Watched(task):  # type: ignore[misc, valid-type]
        watched_steps = 0

        def micro_batches(self, window):
            if self.state.step:  # the first may have to wait for what is made once
                torch.cuda.set_sync_debug_mode("error")
            yield from super().micro_batches(window)

        def after_step(self, bar):
            if self.state.step % self.config.log_every:
                self.watched_steps += torch.cuda.get_sync_debug_mode() == 2
            else:
                torch.cuda.set_sync_debug_mode("default")
            return super().after_step(bar)

        def windows(self, train_loader):
            yield from super().windows(train_loader)
            torch.cuda.set_sync_debug_mode("default")

        def new_metrics(self):
            metrics = super().new_metrics()
            update = metrics.update

            def watched_update(*given):
                torch.cuda.set_sync_debug_mode("error")
                update(*given)
                torch.cuda.set_sync_debug_mode("default")

            metrics.update = watched_update
            return metrics

    return Watched


@pytest.mark.parametrize(
    "options",
    [
        {"grad_clip": 1.0, "ema_decay": 0.9, "mixed_precision": "bf16", "channels_last": True},
        {"micro_batch_size": 16, "mixup": 0.2, "cutmix": 1.0},
        {"model": "resnet18", "optimizer": "sgd", "mixed_precision": "fp16", "gradient_checkpointing": True},
        {"nonfinite": "skip", "optimizer": "adam", "num_workers": 2, "augment": "trivialaugment"},
    ],
)
def test_no_step_between_two_log_lines_waits_for_the_device(tmp_path, options):
    config = make_config(
        output_dir=str(tmp_path),
        experiment_name="x",
        max_steps=20,
        log_every=10,
        batch_size=32,
        cpu_threads=1,
        **options,
    )
    trainer, _, _ = build_trainer(config, watched)
    try:
        assert trainer.train()["state"] == "done"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.watched_steps == 17  # all but the first and those of the log lines, which are 10 and 20


def test_the_log_tells_memory_and_utilization(tmp_path, monkeypatch):
    """A device of 1 TFLOP/s, whatever it is."""
    name = torch.cuda.get_device_name()
    monkeypatch.setattr(mfu, "PEAKS", [(name.split()[-1], {"bf16": 1.0})])
    monkeypatch.setattr(mfu, "OTHERS", set())
    run = {"output_dir": str(tmp_path), "experiment_name": "x", "max_steps": 5, "mixed_precision": "bf16"}
    config = make_config(model="resnet18", **run)
    assert session.run(config) == 0
    (line,) = lines_of(tmp_path / "x", "speed")
    assert line["peak_memory_bytes"] == torch.cuda.max_memory_allocated()
    data, _ = build_data(config)
    flops = cost(build_model(config, data), data.info.channels, data.image_size, 32).flops
    assert line["mfu"] == pytest.approx(3 * flops * line["samples_per_second"] / 1e12, rel=1e-6)


# ---- several processes ------------------------------------------------------------------------------------

FLAGS = (
    "--model bn_net --dropout 0.2 --dtype float64 --max_steps 12 --batch_size 32 --micro_batch_size 16 --mixup 0.2 "
    "--ema_decay 0.9 --grad_clip --trace_samples --log_every 3 --save_every_steps 12"
).split()


def launched(folder: Path, name: str, *flags: str, processes: int | None = 1, sharded: bool = False) -> Path:
    """A run of `processes` that torchrun starts; None: of one that knows of no others."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes else []), "tests/bn_net.py", *FLAGS, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if sharded:
        environment |= {key: value for key, value in FSDP.items() if key != "FSDP_ON_CPU"}
    done = subprocess.run(
        [*command, "--output_dir", str(folder), "--experiment_name", name],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("sharded by FSDP2" in done.stdout) == sharded
    assert json.loads((folder / name / "env.json").read_text())["device"].startswith("cuda")
    return folder / name


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    return launched(tmp_path_factory.mktemp("runs"), "alone", processes=None)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=two_gpus)])
def test_ddp_and_fsdp2_are_one_process(alone, processes, sharded):
    check_alike(alone, launched(alone.parent, f"{processes}_{sharded}", processes=processes, sharded=sharded), 1e-9)


@pytest.mark.parametrize(("processes", "micro"), [(1, 16), pytest.param(2, 8, marks=two_gpus)])
def test_synced_batch_norm_is_that_of_all_that_is_computed_at_once(alone, processes, micro):
    flags = ["--sync_batch_norm", "--micro_batch_size", str(micro), "--dropout", "0"]
    one = launched(alone.parent, f"plain_{micro}", "--dropout", "0", processes=None)
    check_alike(one, launched(alone.parent, f"synced_{micro}", *flags, processes=processes), 1e-9)
