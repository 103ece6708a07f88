"""Every option of a run: a field here is a flag of `scripts/train.py`, a key in YAML and `config.<name>` in code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from configs import model_args
from configs.checks import check


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    dataset: str = "digits"
    """`digits`, `digit_ink`, `digit_captions`, `digit_scenes` (embedded), a hub id, or a folder laid out like it."""
    train_data_dir: str | None = None
    """Images instead of `--dataset`: a subfolder a class, or captions.jsonl/.csv, or COCO's JSON, or Pascal VOC."""
    data_files: tuple[str, ...] = ()
    """Files that are cut into splits, alone or of `--dataset`: paths, patterns, URLs (parquet, .tar, JSON, CSV)."""
    mix_datasets: tuple[str, ...] = ()
    """More datasets of the same classes to train on, besides; validation and test stay those of `--dataset`."""
    mix_weights: tuple[float, ...] = ()
    """Shares of the samples drawn from `--dataset` and each of `--mix_datasets`; default: by their sizes."""
    val_data_dir: str | None = None
    """Image folder for validation; without it a part of the training folder is held out."""
    test_data_dir: str | None = None
    """Image folder that only `scripts/test.py` opens."""
    image_column: str | None = None
    """Image column of a Hugging Face dataset; default: the first of type Image."""
    label_column: str | None = None
    """Label column of a Hugging Face dataset; default: the first of type ClassLabel."""
    label_columns: tuple[str, ...] = ()
    """Several label columns, each a task: classes, lists of classes, or numbers by its type; labels may be missing."""
    labels: Literal["classes", "multi_label", "numbers", "boxes", "captions", "several"] | None = None
    """What the labels are; default: from the columns."""
    num_classes: int | None = None
    """Number of classes, where a stream of numbered labels does not tell."""
    group_column: str | None = None
    """Column whose equal values (a patient, a scene) never fall into two splits."""
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, validation and test where the data come unsplit; they sum to 1."""
    split_seed: int = 0
    """Seed of the split alone, so that runs with other seeds share their test set."""
    streaming: bool = False
    """Read undecoded rows as they are needed: nothing is downloaded as a whole, only neighbours are shuffled."""
    shuffle_buffer: int = 2048
    """Rows of a stream that are at hand and shuffled together; at least four blocks."""
    cache: Literal["none", "ram", "disk"] = "none"
    """Decode and resize each image once, for all processes. Crops of large images come from the resized ones then."""
    sampling: Literal["uniform", "balanced", "repeat_factor"] = "uniform"
    """balanced: every class as often; repeat_factor: rare ones more, by a root (https://arxiv.org/abs/1908.03195)."""
    augment_rare: Literal["none", "autoaugment", "randaugment", "trivialaugment"] = "none"
    """The policy instead of `--augment`'s for classes with less than half of the mean class's samples."""
    max_bad_fraction: float = 0.01
    """Share of broken samples that is replaced and noted in bad_samples.jsonl; beyond it the run stops."""
    image_size: int | None = None
    """Side of the square the model sees, in pixels; default: the dataset's own, at most 224."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour; default: from the dataset table or the first image."""
    augment: Literal["none", "default", "autoaugment", "randaugment", "trivialaugment"] = "default"
    """`default`: random crop, and flip where the dataset allows it; the others add their policy to it."""
    random_erasing: float = 0.0
    """Probability of erasing a random rectangle of a training image."""
    mixup: float = 0.0
    """MixUp's Beta parameter; 0 is off (https://arxiv.org/abs/1710.09412)."""
    cutmix: float = 0.0
    """CutMix's Beta parameter; 0 is off; with both on, each pair draws one of the two (https://arxiv.org/abs/1905.04899)."""
    mix_off_epoch: int | None = None
    """From this epoch on (counted from 0) MixUp and CutMix are off."""
    num_workers: int | None = None
    """Loader processes; default: 0 for data in memory, else a share of the cores less 1, up to 8. Changes no pixel."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    task: str | None = None
    """What is learnt: a name from the table in `scripts/wiring.py`; default: from the labels of the data."""
    model: str | None = None
    """`simple_cnn` (default), any classifier or detector of torchvision, `small_fcos`, clip/NAME, timm/NAME."""
    weights: str | None = None
    """Weights to begin with, all of them: a run, a checkpoint, `best/`, a .safetensors or .pth file, a hub id."""
    pretrained: str | None = None
    """Like `--weights`, but what does not fit, as a head of other classes, begins anew; or `torchvision`, or `timm`."""
    freeze_epochs: int = 0
    """For so many epochs the head learns alone; as many as `--epochs` make a linear probe."""
    model_args: tuple[str, ...] = ()
    """More arguments of the model's constructor, as YAML: `width=32 anchor_sizes=[8,16,32]`; in a file a mapping."""
    dropout: float | None = None
    """Dropout before the classifier; default: the model's own."""
    compile: bool = False
    """Compile the model with torch.compile."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the model's blocks, and compute the rest twice: less memory, more time, same result."""
    sync_batch_norm: bool = False
    """BatchNorm over what all processes compute at once, on GPUs; their number is part of the result then."""
    channels_last: bool = False
    """Store image tensors with the channels last: faster on recent GPUs."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights, 0.999 for example; 0 is off."""
    swa_start_epoch: int | None = None
    """SWA: use the mean of the weights at the ends of epochs, from this one on (counted from 0)."""
    teacher: str | None = None
    """Distill this model into the one that is trained: whatever `--weights` takes that has a config.json beside it."""
    distill_weight: float = 0.5
    """Share of the distillation in the loss; the rest is the cross entropy with the labels."""
    distill_temperature: float = 2.0
    """What the logits of both models are divided by (https://arxiv.org/abs/1503.02531)."""


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    epochs: int = 20
    """Passes over the training data."""
    max_steps: int | None = None
    """Train for exactly this many optimizer steps, whatever `--epochs` says."""
    batch_size: int = 32
    """GLOBAL batch size: samples in one optimizer step, over all processes."""
    batch_size_schedule: tuple[str, ...] = ()
    """Other global batch sizes, each with the epoch that it begins at (counted from 0): `30:512 60:1024`."""
    micro_batch_size: int = 64
    """Samples a process computes at once; a larger batch is accumulated from several."""
    auto_micro_batch: bool = False
    """Take the largest micro-batch that the GPU's memory allows; found once, then part of the run."""
    optimizer: Literal["adamw", "adam", "sgd", "muon"] = "adamw"
    """sgd has Nesterov momentum; muon takes the weight matrices, adamw the rest."""
    lr: float = 2e-3
    """Peak learning rate."""
    lr_scale: Literal["none", "linear", "sqrt"] = "none"
    """How the learning rate grows with the batch size; `--lr` is then that of a batch of 256."""
    momentum: float = 0.9
    """Momentum of sgd and muon."""
    weight_decay: float = 0.05
    """Weight decay; biases and norms are left out."""
    layer_decay: float = 1.0
    """What the learning rate is multiplied by for every block below the head, 0.75 for example; 1 is off."""
    grad_clip: float | None = None
    """Largest global gradient norm; the bare flag means 1.0."""
    swa_lr: float | None = None
    """Constant learning rate from `--swa_start_epoch` on; default: the schedule goes on."""
    scheduler: Literal["cosine", "step", "plateau", "exponential", "one_cycle", "constant"] = "cosine"
    """Course of the learning rate, computed once an optimizer step."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0 to its peak."""
    decay_factor: float = 0.1
    """What step, plateau and exponential multiply the learning rate by (exponential: every epoch)."""
    decay_epochs: int = 30
    """Epochs between two decays of step; evaluations without improvement before one of plateau."""
    label_smoothing: float = 0.0
    """Share of each label spread evenly over all classes."""
    class_weights: Literal["none", "balanced", "sqrt"] = "none"
    """The loss of a sample weighs by 1 / (its class's training samples), or by the root of that."""
    loss_weights: tuple[str, ...] = ()
    """What the losses of several tasks weigh, `digit=1 ink=0.5`; or `learnt` (https://arxiv.org/abs/1705.07115)."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of weights and sums; float64 is for comparing runs, and slow."""
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = None
    """Default: what the launcher says. The bare flag (auto) means fp16 on CUDA and bf16 elsewhere."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    experiment_name: str | None = None
    """Name of the run folder; default: time, model and dataset."""
    output_dir: str = "runs"
    """Folder of the run folders."""
    resume: str = "auto"
    """`auto` continues the run of `--experiment_name`, `never` refuses to, a path continues that run or checkpoint."""
    fresh: bool = False
    """Begin anew where `--experiment_name` exists, in a folder of its own (NAME-2)."""
    seed: int = 0
    """Seed of weights, order, augmentation and dropout."""
    deterministic: bool = False
    """Use deterministic algorithms only; on a CPU two runs are equal to the bit without it."""
    cpu_threads: int | None = None
    """Threads of torch on the CPU, a process; default: the cores shared out. Stored: they change the last bits."""
    log_every: int = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    save_every_steps: int | None = None
    """Save a checkpoint every so many optimizer steps, besides the one after each epoch."""
    save_every_minutes: float | None = None
    """Save a checkpoint whenever so many minutes have passed since the last one."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 1
    """Checkpoints kept besides for the best value of `--monitor`."""
    monitor: str | None = None
    """The metric of the validation line that decides what is best; default: the task's own, accuracy for example."""
    monitor_mode: Literal["min", "max"] | None = None
    """Whether less or more is better; default: from a table."""
    min_delta: float = 0.0
    """Smallest change of the monitored metric that counts as an improvement."""
    early_stopping: bool = False
    """Stop after `--patience` evaluations without improvement."""
    patience: int = 10
    """Evaluations without improvement before early stopping."""
    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """A loss or gradient that is not finite: stop (exit code 3), skip the update, or go back to the last checkpoint."""
    max_nonfinite: int = 10
    """How many such steps are skipped or gone back from before the run stops."""
    stop_after_steps: int | None = None
    """End this session after so many optimizer steps, saved; the same command continues (exit code 75)."""
    trace_samples: bool = False
    """Write the sample ids of every step to samples.jsonl."""
    use_tensorboard: bool = False
    """Log to TensorBoard: `tensorboard --logdir runs`."""
    use_wandb: bool = False
    """Log to Weights & Biases; WANDB_MODE=offline works."""
    wandb_project: str = "accelerate-vision-template"
    """Project of Weights & Biases."""
    push_to_hub: bool = False
    """Push the best model to the Hugging Face hub at the end."""
    hub_model_id: str | None = None
    """Repository to push to, `user/name`."""
    use_multigpu: bool = False
    """With plain python: start again by `accelerate launch`, a process for each visible GPU."""
    find_unused_parameters: bool = False
    """Let DDP look for parameters that took no part in a step; without it such a model is refused."""
    expect_processes: int | None = None
    """Stop where the launcher has started another number of processes."""
    check: bool = False
    """Try out all that this run needs (a step, a checkpoint, space, data, logins), then stop; no run is begun."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, OptimOptions, ModelOptions, DataOptions):
    """One run. Raises ConfigError where its fields contradict each other (configs/checks.py)."""

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "model_args", model_args.written(self.model_args))
