"""Three classifiers trained on CIFAR-10: the Vision Transformer whose features are the representation, and two judges.

The judges measure reconstructions and generated pictures: narrow ResNet-18s of other seeds. One learned the classes, as
the encoder did, so both may overlook the same things; the other one learned by how many quarters a picture is turned.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkpoints import write_whole
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from psvae import SemanticEncoder, SemanticEncoderConfig
from reproduction.cifar import CLASSES, SIDE, Split
from reproduction.training import Machine, Recipe, batched, fit

PATCH = 4  # 8 x 8 tokens
CROPS = (24, 32)  # the first stage learns smaller crops, which are cheaper, the second whole pictures
PADDING = 4
QUARTERS = 4


class Classifier(nn.Module):
    """An encoder and a linear layer on the mean of its tokens."""

    def __init__(self, encoder: SemanticEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.feature_dim, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images).mean(dim=(2, 3)))


def encoder_config(width: int, depth: int, patch: int = PATCH) -> SemanticEncoderConfig:
    vit = {"img_size": SIDE, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": width // 32}
    return SemanticEncoderConfig("vit_tiny_patch16_224", vit, stride=patch)


def train_encoder(
    train: Split, config: SemanticEncoderConfig, recipe: Recipe, small_steps: int, folder: Path, machine: Machine
) -> None:
    """Two stages, each kept: ``folder/24`` learns crops of 24 pixels, ``folder/32`` goes on with whole pictures."""
    for crop, steps in zip(CROPS, (small_steps, recipe.steps), strict=True):
        place = folder / str(crop)
        if (place / "model.pt").exists():
            continue
        torch.manual_seed(recipe.seed)
        model = Classifier(SemanticEncoder(config)).to(machine.device)
        if crop != CROPS[0]:
            model.load_state_dict(torch.load(folder / str(CROPS[0]) / "model.pt", weights_only=True))

        def loss(model: nn.Module, places: Tensor, step: int, crop: int = crop) -> Tensor:
            shown = augmented(train.images(places), crop).to(machine.device)
            return cross_entropy(model(shown), train.labels[places].to(machine.device))

        stage = Recipe(steps, recipe.batch, recipe.lr, recipe.seed + crop, recipe.weight_decay, clip=recipe.clip)
        finish(fit(model, loss, stage, len(train.labels), place, machine), place)
    model = Classifier(SemanticEncoder(config))
    model.load_state_dict(torch.load(folder / str(CROPS[-1]) / "model.pt", weights_only=True))
    model.encoder.eval().save_pretrained(folder / "encoder")


def finish(model: nn.Module, folder: Path) -> None:
    """The weights in place of the training's state."""
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    write_whole(folder / "model.pt", lambda partial: torch.save(state, partial))
    (folder / "state.pt").unlink(missing_ok=True)


def augmented(images: Tensor, crop: int) -> Tensor:
    """Half mirrored; a crop at a place of its own from each picture, reflected at its edges."""
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    padded = F.pad(images, (PADDING,) * 4, mode="reflect")
    most = SIDE + 2 * PADDING - crop
    top, left = torch.randint(most + 1, (2, len(images), 1, 1))
    rows, columns = top + torch.arange(crop)[:, None], left + torch.arange(crop)
    return padded[torch.arange(len(images))[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, label_smoothing=0.1)


class Judge(nn.Module):
    """ResNet-18 for small pictures: a 3 x 3 stem without pooling, a fraction of the width."""

    def __init__(self, width: int, answers: int) -> None:
        super().__init__()
        net: Any = ResNet(BasicBlock, [2, 2, 2, 2])
        net.inplanes = width
        net.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        net.bn1, net.maxpool = nn.BatchNorm2d(width), nn.Identity()
        for number, (factor, stride) in enumerate(((1, 1), (2, 2), (4, 2), (8, 2)), start=1):
            setattr(net, f"layer{number}", net._make_layer(BasicBlock, factor * width, 2, stride))
        net.fc = nn.Identity()
        self.net, self.head = net, nn.Linear(8 * width, answers)

    def features(self, images: Tensor) -> Tensor:
        """``B 3 H W`` in [-1, 1] → ``B 8·width``, what the last layer reads."""
        return self.net(images.contiguous(memory_format=torch.channels_last))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class Judges(NamedTuple):
    """Of classes, and of turns."""

    classes: Judge
    turns: Judge


ANSWERS = {"classes": CLASSES, "turns": QUARTERS}  # by what a judge tells apart


def train_judge(which: str, train: Split, width: int, recipe: Recipe, folder: Path, machine: Machine) -> None:
    if (folder / "model.pt").exists():
        return
    torch.manual_seed(recipe.seed)
    judge = Judge(width, ANSWERS[which]).to(machine.device, memory_format=torch.channels_last)

    def loss(model: nn.Module, places: Tensor, step: int) -> Tensor:
        shown, answers = augmented(train.images(places), SIDE), train.labels[places]
        if which == "turns":
            shown, answers = turned(shown)
        return cross_entropy(model(shown.to(machine.device)), answers.to(machine.device))

    finish(fit(judge, loss, recipe, len(train.labels), folder, machine), folder)


def turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """Each by 0 to 3 quarters, and by how many."""
    quarters = torch.randint(QUARTERS, (len(images),))
    shown = [image.rot90(int(quarter), dims=(1, 2)) for image, quarter in zip(images, quarters, strict=True)]
    return torch.stack(shown), quarters


def load_judge(which: str, width: int, folder: Path, machine: Machine) -> Judge:
    judge = Judge(width, ANSWERS[which]).to(memory_format=torch.channels_last)
    judge.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return judge.to(machine.device).eval().requires_grad_(False)


def accuracy(judge: Judge, images: Tensor, labels: Tensor, machine: Machine) -> float:
    """Of images ``N 3 H W`` in [-1, 1], the share that the judge names as ``labels``."""
    said = batched(judge, images, machine).argmax(dim=1)
    return (said == labels).float().mean().item()
