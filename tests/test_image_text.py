"""Images and texts: captions in, a loss over all processes, recall out."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import models
from configs.arguments import make_config
from configs.errors import ConfigError, DataError
from data.captions import CaptionLabels, texts_of
from data.dataset import load_data
from models.model import build
from scripts import retrieve
from scripts.measure import measure
from scripts.wiring import build_trainer
from tests.conftest import FSDP, ROOT, lines_of
from tests.test_scale import apart
from trainer.contrastive import contrastive_loss
from trainer.retrieval import NAMES, RetrievalMetrics, names_of

WORDS = {"dark": 20, "grey": 110, "bright": 220}
TINY = {
    "batch_size": 8, "epochs": 2, "cpu_threads": 1, "augment": "none", "lr": 2e-3, "num_workers": 0, "log_every": 1,
    "grad_clip": 1.0, "ema_decay": 0.9, "trace_samples": True, "split": (0.8, 0.1, 0.1), "warmup_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """60 pictures of two halves, each with one caption or two: `dark above bright`, `bright below dark`."""
    root, generator = tmp_path_factory.mktemp("captioned"), np.random.default_rng(0)
    with (root / "captions.jsonl").open("w") as file:
        for number in range(60):
            one, other = generator.choice(list(WORDS), 2)
            pixels = generator.integers(0, 30, (12, 12)) + np.repeat([WORDS[one], WORDS[other]], 6)[:, None]
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number:02d}.png")
            print(json.dumps({"file_name": f"{number:02d}.png", "text": f"{one} above {other}"}), file=file)
            if number % 2:
                print(json.dumps({"file_name": f"{number:02d}.png", "text": f"{other} below {one}"}), file=file)
    return root


def trained(folder: Path, output: Path, name: str, **options) -> Path:
    config = make_config(
        **(TINY | {"train_data_dir": str(folder), "output_dir": str(output), "experiment_name": name} | options)
    )
    trainer, _, _ = build_trainer(config)
    trainer.train()
    return trainer.run.path


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return trained(folder, tmp_path_factory.mktemp("runs"), "whole")


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=1)


def loss_by_loops(images: Tensor, texts: Tensor, scale: Tensor, captions: list[str]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for one, other in ((images, texts), (texts, images)):
        for place, caption in enumerate(captions):
            logits = [scale[0] * (one[place] * item).sum() for item in other]
            whole = sum(logit.exp() for logit in logits)
            own = [logit for logit, another in zip(logits, captions) if another == caption]
            total = total - sum((logit.exp() / whole).log() for logit in own) / len(own)
    return total / (2 * len(captions))


def numbered(texts: list[str]) -> torch.Tensor:
    """Tokens of texts: equal ones for equal texts."""
    return torch.tensor([[texts.index(text)] for text in texts])


def test_loss_and_gradient_are_those_of_explicit_loops():
    """Of equal captions each is as right as the other."""
    generator = torch.Generator().manual_seed(0)
    captions = ["a one", "a two", "a one", "a three", "a two", "a one"]
    given = [unit(generator, 6, 4), unit(generator, 6, 4), torch.tensor([7.0], dtype=torch.float64)]
    found = []
    for loss_of in (lambda i, t, s: contrastive_loss((i, t, s), names_of(numbered(captions))),
                    lambda i, t, s: loss_by_loops(i, t, s, captions)):  # fmt: skip
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        loss = loss_of(*leaves)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for mine, reference in zip(*found):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-14)


def recall_by_loops(images: Tensor, captions: list[tuple[str, ...]], texts: dict[str, Tensor]) -> dict[str, float]:
    found, names = {}, list(texts)
    for depth in (1, 5, 10):
        hits = []
        for caption in (text for own in captions for text in own):
            nearest = sorted(range(len(images)), key=lambda n: -float(images[n] @ texts[caption]))[:depth]
            hits.append(any(caption in captions[place] for place in nearest))
        found[f"recall_at_{depth}"] = sum(hits) / len(hits)
        hits = []
        for image, own in zip(images, captions):
            nearest = sorted(names, key=lambda name: -float(image @ texts[name]))[:depth]
            hits.append(any(name in own for name in nearest))
        found[f"image_to_text_recall_at_{depth}"] = sum(hits) / len(hits)
    return found


def told(metrics: RetrievalMetrics, images: Tensor, captions: list[tuple[str, ...]], texts: dict[str, Tensor], ids):
    flat = [text for own in captions for text in own]
    each = torch.tensor([len(own) for own in captions])
    batch = {"ids": ids, "names_T": names_of(numbered(flat)), "image_ids_T": ids.repeat_interleave(each)}
    metrics.update((images, torch.stack([texts[text] for text in flat]), None), batch)


def test_recall_is_that_of_explicit_loops(monkeypatch):
    """Several captions an image, some of them of several images; in chunks, in any order."""
    monkeypatch.setattr("trainer.retrieval.CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    names = [f"caption {number}" for number in range(25)]
    texts = {name: unit(generator, 1, 6)[0].float() for name in names}
    chosen = [torch.randperm(25, generator=generator)[: 1 + place % 3].tolist() for place in range(40)]
    captions = [tuple(names[number] for number in own) for own in chosen]
    images = torch.nn.functional.normalize(
        torch.stack([texts[own[0]] for own in captions]) + unit(generator, 40, 6).float(), dim=1
    )
    metrics = RetrievalMetrics(torch.device("cpu"))
    for places in torch.randperm(40, generator=generator).split(9):
        told(metrics, images[places], [captions[place] for place in places.tolist()], texts, places)
    found = metrics.compute()
    assert found == pytest.approx(recall_by_loops(images, captions, {n: texts[n] for own in captions for n in own}))
    assert 0.1 < found["recall_at_1"] < found["recall_at_5"] < 1


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_what_cannot_be_told_apart_is_no_hit(value):
    metrics, texts = RetrievalMetrics(torch.device("cpu")), {str(n): torch.full((4,), value) for n in range(12)}
    told(metrics, torch.full((12, 4), value), [(name,) for name in texts], texts, torch.arange(12))
    assert metrics.compute() == dict.fromkeys(NAMES, 0.0)


def test_a_saved_model_needs_nothing_else_to_read_texts(run, tmp_path):
    model = models.load(str(run))
    alone = shutil.copytree(run / "best", tmp_path / "alone")
    again = models.BaseModel.from_pretrained(alone)
    texts = ["bright above grey", "words it has never seen", ""]
    assert torch.equal(model.tokens(texts), again.tokens(texts))
    assert (model.tokens(texts) > 0).sum(1).tolist()[2] == 1  # the end alone
    images = torch.randint(0, 256, (3, 1, 12, 12), dtype=torch.uint8)
    with torch.no_grad():
        one, other = model(images, model.tokens(texts)), again(images, again.tokens(texts))
    assert all(torch.equal(a, b) for a, b in zip(one, other))
    assert one.images_BD.norm(dim=1) == pytest.approx([1, 1, 1])
    assert torch.isfinite(one.texts_BD).all()


def test_the_tokenizer_is_the_same_in_every_process():
    command = "from data.captions import learn_tokenizer as f; print(f(open('README.md').read().splitlines()))"
    told = [subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True).stdout for _ in range(2)]
    assert told[0] == told[1] and len(told[0]) > 10_000


def test_a_text_is_the_same_whatever_is_beside_it():
    tokenizer = CaptionLabels([("one two three four five",), ("six",)]).model_args["tokenizer"]
    model = build("clip/grid_cnn", tokenizer=tokenizer, in_channels=1, image_size=8).double().eval()
    both = model.embed_texts(model.tokens(["six", "one two three four five"]))
    alone = model.text_encoder(model.tokens(["six"])[:, :2])[0]  # without padding
    torch.testing.assert_close(both[0], torch.nn.functional.normalize(alone, dim=0))
    changed = model.embed_texts(model.tokens(["five four three two one"]))[0]
    assert (changed - both[1]).norm() > 1e-3  # the order of words counts


def test_a_caption_is_drawn_by_seed_epoch_and_sample(folder, tmp_path):
    trainer, data, _ = build_trainer(
        make_config(**(TINY | {"train_data_dir": str(folder), "output_dir": str(tmp_path)}))
    )
    assert not data.info.horizontal_flip
    captions, ids = [("a", "b", "c")] * 300, torch.arange(300)
    drawn = trainer.drawn(captions, ids)
    assert drawn[100:] == trainer.drawn(captions[100:], ids[100:])
    assert all(80 < drawn.count((text,)) < 120 for text in "abc")
    trainer.state.epoch = 1
    assert 60 < sum(a == b for a, b in zip(drawn, trainer.drawn(captions, ids))) < 140


def test_a_stream_has_the_same_captions_and_recall(folder, run):
    options = TINY | {"train_data_dir": str(folder), "val_data_dir": str(folder)}
    one, other = (load_data(make_config(**options, streaming=streaming)).train for streaming in (False, True))
    assert other.source.rows(np.arange(60)).labels.tolist() == one.labels.tolist()
    assert other.source.kind.model_args == one.source.kind.model_args
    whole, streamed = (
        measure(make_config(**options, streaming=streaming), str(run), "val") for streaming in (False, True)
    )
    assert whole == streamed
    assert set(whole) == {*NAMES, "samples"}


def processes_train(folder: Path, output: Path, name: str, processes: int, *flags: str, sharded: bool = False) -> Path:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    options = (
        "--batch_size 16 --micro_batch_size 16 --max_steps 20 --dtype float64 --optimizer sgd --lr 0.05 "
        "--grad_clip 0.5 --ema_decay 0.9 --warmup_steps 2 --cpu_threads 1 --log_every 5 --num_workers 0 "
        f"--trace_samples --split 0.95 0.05 0 --train_data_dir {folder} --output_dir {output} --experiment_name {name}"
    ).split()
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "tests/bn_net.py", *options, *flags],
        cwd=ROOT, env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | (FSDP if sharded else {}),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert json.loads((output / name / "status.json").read_text())["state"] in ("done", "preempted"), done.stderr
    return output / name


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> Path:
    return processes_train(folder, tmp_path_factory.mktemp("processes"), "alone", 1)


@pytest.mark.long
@pytest.mark.parametrize(("processes", "sharded"), [(2, False), (4, False), (2, True)])
def test_the_loss_is_over_the_samples_of_all_processes(folder, alone, processes, sharded):
    """Weights and averages after 20 steps; recall over 3 images, fewer than 4 processes."""
    other = processes_train(folder, alone.parent, f"with_{processes}_{sharded}", processes, sharded=sharded)
    check_alike(alone, other)


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_processes(folder, alone):
    for processes in (1, 2, 4, 1):
        other = processes_train(folder, alone.parent, "course", processes, "--stop_after_steps", "5")
    check_alike(alone, other)


def check_alike(alone: Path, other: Path) -> None:
    """Weights, averages, samples, recall and losses of two runs in float64."""
    assert apart(alone, other, "model.safetensors") < 1e-9
    assert apart(alone, other, "ema.safetensors") < 1e-9
    assert (alone / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    assert lines_of(alone, "val") == lines_of(other, "val")
    for line, same in zip(lines_of(alone, "train"), lines_of(other, "train")):
        assert line["loss"] == pytest.approx(same["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(same["grad_norm"], rel=1e-6)


def test_a_batch_in_parts_is_refused(folder, tmp_path):
    options = TINY | {"train_data_dir": str(folder), "output_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match="compares all 8 samples"):
        build_trainer(make_config(**options, micro_batch_size=4))
    with pytest.raises(ConfigError, match="did you mean clip/simple_cnn"):
        build_trainer(make_config(**options, model="simple_cnn"))
    with pytest.raises(ConfigError, match="mixup needs one class"):
        build_trainer(make_config(**options, mixup=0.2))


def test_cells_of_all_forms_become_captions():
    assert texts_of(" a one ") == ("a one",)
    assert texts_of(["a one", "", " ", None, 3, "a two"]) == ("a one", "a two")
    assert texts_of(None) == texts_of("") == texts_of(math.nan) == ()


def test_hub_datasets_have_their_captions_found(tmp_path):
    import datasets

    pictures = [Image.fromarray(np.full((8, 8), 20 * number, np.uint8)) for number in range(10)]
    texts = [[f"grey {number}", "a square"] for number in range(9)]
    for column, cells in (("sentences", texts), ("text", [own[0] for own in texts])):
        features = datasets.Features(
            image=datasets.Image(), note=datasets.Value("string"),
            **{column: datasets.List(datasets.Value("string")) if column == "sentences" else datasets.Value("string")},
        )  # fmt: skip
        cells = [*cells, None]
        rows = {"image": pictures, "note": ["x"] * 10, column: cells}
        table = datasets.Dataset.from_dict(rows, features=features)
        (tmp_path / column).mkdir()
        table.to_parquet(tmp_path / column / "train.parquet")
        with pytest.raises(DataError, match="it has no caption"):
            load_data(make_config(dataset=str(tmp_path / column)))
        streamed = load_data(make_config(dataset=str(tmp_path / column), streaming=True, split=(1, 0, 0)))
        rows = streamed.train.source.rows(np.arange(10))
        assert rows.labels[3] == (tuple(texts[3]) if column == "sentences" else ("grey 3",))
        assert streamed.kind.fault(rows.labels[9])


def test_a_stream_from_the_front_tells_its_words_as_it_goes(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for number in range(40):
            picture = io.BytesIO()
            Image.fromarray(np.full((8, 8), 6 * number, np.uint8)).save(picture, "PNG")
            for name, content in (("png", picture.getvalue()), ("txt", f"grey number {number % 7}".encode())):
                entry = tarfile.TarInfo(f"{number:02d}.{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    stream = {"data_files": (str(tmp_path / "train.tar"),), "streaming": True, "label_column": "txt"}
    config = TINY | stream | {"labels": "captions", "max_steps": 4, "output_dir": str(tmp_path / "runs")}
    trainer, _data, _ = build_trainer(make_config(**config))
    assert trainer.plain_model.tokens.length == 4  # grey, number, its digit, the end
    assert next(iter(trainer.train_loader))["captions"][0][0].startswith("grey number ")
    assert trainer.train()["state"] == "done"
    assert trainer.run.path.parent == tmp_path / "runs"  # though the model's name has a slash


def test_without_the_package_one_line_says_what_to_install(folder, run):
    code = """
import sys
sys.modules["tokenizers"] = None
import models
from configs.arguments import make_config
from data.dataset import load_data
for work in (lambda: load_data(make_config(train_data_dir=sys.argv[1])), lambda: models.load(sys.argv[2])):
    try:
        work()
    except Exception as error:
        print(type(error).__name__, "[multimodal]" in str(error))
load_data(make_config())
"""
    done = subprocess.run([sys.executable, "-c", code, folder, run], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["ConfigError", "True", "ModelError", "True"], done.stderr


def test_a_picture_that_is_missing_is_replaced_and_noted(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "07.png").unlink()
    run = trained(broken, tmp_path, "broken", max_bad_fraction=0.1, epochs=3, val_data_dir=str(folder))
    (line,) = (run / "bad_samples.jsonl").read_text().splitlines()
    assert line.count("07.png") and "cannot read" in line


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("captions.csv", "file_name,caption\n00.png,\n01.png,x\n02.png,y\n", "no caption"),
        ("captions.csv", "picture,caption\n00.png,x\n", "names no image"),
        ("captions.jsonl", "{", "cannot read the captions"),
        ("captions.jsonl", "", "there is no caption"),
        ("captions.csv", "image,text\n00.png,x\n01.png,x\n", "the same caption"),
    ],
)
def test_a_file_of_captions_that_cannot_be_used_is_told(folder, tmp_path, name, content, words):
    for number in range(3):
        shutil.copy(folder / f"{number:02d}.png", tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        load_data(make_config(train_data_dir=str(tmp_path), split=(1, 0, 0)))


def test_a_text_finds_images(folder, run, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    flags = ["--weights", str(run), "dark above bright", "--images", str(folder), "--top", "3", "--output", str(sheet)]
    assert retrieve.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    cosines = [float(line.split()[0]) for line in lines[:3]]
    assert cosines == sorted(cosines, reverse=True)
    assert all(Path(line.split()[1]).parent == folder for line in lines[:3])
    assert Image.open(sheet).size == (480, 160)


def test_prompts_tell_classes(folder, run, tmp_path, image_folder):
    config = make_config(test_data_dir=str(image_folder), output_dir=str(tmp_path), cpu_threads=1, num_workers=0)
    found = measure(config, str(run), "test", ["{} above {}"], ["bright", "dark"])
    swapped = measure(config, str(run), "test", ["{} above {}"], ["dark", "bright"])
    assert found["samples"] == 16 and found["accuracy"] + swapped["accuracy"] == pytest.approx(1)
    with pytest.raises(ConfigError, match="no {} for the class"):
        measure(config, str(run), "test", ["a photo"])


def test_scenes_of_digits_share_no_digit():
    data = load_data(make_config(dataset="digit_captions"), test=True)
    sizes = [len(split) for split in (data.train, data.val, data.test)]
    assert sizes == [6000, 300, 300]
    alone = load_data(make_config(), test=True)
    known = {digit.tobytes() for digit in alone.train.source.images_NCHW.numpy()[alone.train.ids]}
    held_out = {digit.tobytes() for digit in alone.test.source.images_NCHW.numpy()[alone.test.ids]} - known
    for split, there in ((data.train, False), (data.test, True)):
        places = [place for place in range(300) if " " not in split.labels[place][0].split(" ", 1)[1]]
        found = set()
        for place in places:  # of a digit alone: where it lies is not known, so look everywhere
            image = split.source.images_NCHW[place, 0].numpy()
            found |= {image[r : r + 8, c : c + 8].tobytes() for r in range(17) for c in range(17)}
        assert bool(found & held_out) == there
