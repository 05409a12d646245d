"""Whether classes can be read from latents, by a linear layer and nearest neighbours.

For compare_reals.py and evaluate.py. Both see each number standardised by the pictures that they learn from, so a
latent's scale does not matter to them. Below: who learns and who is tested, for evaluate.py.
"""

import os
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from cache_latents import some
from reconstruction import MeasuredPictures, Rows
from sampling import generator_of
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from psvae import PSVAE, PixelVAE

NEIGHBOURS, STRENGTH, ITERATIONS = 20, 0.01, 2000
PROTOCOL = {
    "linear_probe": f"multinomial logistic regression (scikit-learn, C {STRENGTH}, at most {ITERATIONS} iterations)",
    "knn": f"vote of the {NEIGHBOURS} nearest neighbours by cosine (scikit-learn)",
}


def accuracies(known: np.ndarray, labels: np.ndarray, unknown: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    """Of a probe that learns rows ``N F`` with their labels ``N``, on other rows: linear_probe and knn."""
    scaler = StandardScaler()
    known, unknown = scaler.fit_transform(known), scaler.transform(unknown)
    models = {
        "linear_probe": LogisticRegression(C=STRENGTH, max_iter=ITERATIONS),
        "knn": KNeighborsClassifier(NEIGHBOURS, metric="cosine"),
    }
    return {name: round(float(model.fit(known, labels).score(unknown, answers)), 4) for name, model in models.items()}


class Probe(NamedTuple):
    """Who learns and who is tested.

    Attributes:
        known, unknown: classes by place: what is learned from, and what is tested.
        train: where the known are; None where they are in the data itself.
        forms: of the latent that is read, see `latent_forms`.
        said: in words, for the protocol.
    """

    known: dict[int, str]
    unknown: dict[int, str]
    train: MeasuredPictures | None
    forms: tuple[str, ...]
    said: str


def plan_probe(
    pictures: MeasuredPictures, train: MeasuredPictures | None, forms: tuple[str, ...], share: float, seed: int
) -> Probe:
    """Who learns and who is tested: those of ``train`` teach where it is given.

    Args:
        share: of each class of the pictures that is held out to be tested where there is no ``train``; ``seed``
            chooses it.

    Raises:
        SystemExit: classes are lacking, or pictures of them.
    """
    labels = labels_of(pictures)
    if train is not None:
        twice = {train.identity(place) for place in train.places} & {pictures.identity(place) for place in labels}
        if twice:
            raise SystemExit(f"{len(twice)} pictures of --data are in --probe-train too: {some(sorted(twice))}")
        known, unknown = labels_of(train), labels
        split = f", split {train.source.split}" if train.source.split else ""
        said = f"learned from {len(known)} pictures of {train.source.data}{split}, tested on all {len(unknown)}"
    else:
        unknown = held_out(labels, share, seed, pictures.source.data)
        known = {place: label for place, label in labels.items() if place not in unknown}
        said = (
            f"learned from {len(known)} of the pictures, tested on {len(unknown)} others: {share:g} of "
            f"each class, drawn with seed {seed}"
        )
    strange = sorted(set(unknown.values()) - set(known.values()))
    if strange:
        raise SystemExit(f"--probe-train has no pictures of the classes {some(strange)}, which --data has")
    if len(set(known.values())) < 2:
        raise SystemExit(f"all pictures to learn from are of the class {known.popitem()[1]}; a probe wants two or more")
    if len(known) < NEIGHBOURS:
        raise SystemExit(
            f"{len(known)} pictures to learn from came; the {NEIGHBOURS} nearest neighbours want as many or more"
        )
    return Probe(known, unknown, train, forms, f"{said}; {len(set(known.values()))} classes")


def labels_of(pictures: MeasuredPictures) -> dict[int, str]:
    """The class of each picture that is measured, by its place.

    Raises:
        SystemExit: some have none.
    """
    classes = pictures.classes()
    found = {place: classes[place] for place in pictures.places}
    without = [pictures.name(place) for place, label in found.items() if not label]
    if without:
        raise SystemExit(
            f"{len(without)} pictures of {pictures.source.data} have no class: {some(without)}; --probe wants one "
            "subfolder per class and nothing beside, or a --label-column with a label in each row"
        )
    return found


def held_out(labels: dict[int, str], share: float, seed: int, data: str) -> dict[int, str]:
    """A share of each class, of one picture or more; ``data`` is what messages call them."""
    found = {}
    for label in sorted(set(labels.values())):
        mine = [place for place, name in labels.items() if name == label]
        if len(mine) < 2:
            raise SystemExit(f"{data} has one picture of the class {label}; to learn and to test takes two")
        order = torch.randperm(len(mine), generator=generator_of(seed, "probe", label)).tolist()
        some_of = order[: min(len(mine) - 1, max(1, round(share * len(mine))))]
        found |= {mine[number]: label for number in sorted(some_of)}
    return found


def refuse_too_large(vae: PSVAE | PixelVAE, probe: Probe, size: int, name: str) -> None:
    """Latents that this machine's memory cannot hold, before they are computed."""
    cells = (size // vae.config.spatial_compression_ratio) ** 2
    count = len(probe.known) + len(probe.unknown)
    taken = 3 * 4 * count * vae.config.latent_channels * cells  # float32; as read, standardised, and in the solver
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if "flat" in probe.forms and taken > there:
        raise SystemExit(
            f"a probe on all numbers of {count} latents of {name} takes some {taken / 1e9:.0f} GB, and this machine "
            f"has {there / 1e9:.0f}: pass --probe-on pooled, or fewer pictures by --count and --probe-count"
        )


def probed(rows: Rows, learned: Rows, probe: Probe, latent: str) -> dict[str, dict[str, Any]]:
    """Each number with what belongs to its protocol; ``latent`` says what was read."""
    read_as = {"pooled": "mean over the cells of the latent", "flat": "all numbers of the latent"}
    names = sorted(set(probe.known.values()))

    def chosen(source: Rows, form: str, labels: dict[int, str]) -> tuple[np.ndarray, np.ndarray]:
        kept = [(row, labels[place]) for row, place in enumerate(source["place"].tolist()) if place in labels]
        found = source[f"{form} latents"][[row for row, _ in kept]].numpy()
        return found, np.array([names.index(label) for _, label in kept])

    numbers: dict[str, dict[str, Any]] = {}
    for form in probe.forms:
        known = chosen(rows if probe.train is None else learned, form, probe.known)
        unknown = chosen(rows, form, probe.unknown)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = accuracies(*known, *unknown)
        for name, value in found.items():
            spoken = (
                sorted({" ".join(str(one.message).split())[:200] for one in said}) if name == "linear_probe" else []
            )
            numbers[f"{name}_{form}"] = {
                "value": value,
                "measure": f"top-1 accuracy: {PROTOCOL[name]}, each number standardised by those learned from",
                "latent": f"{latent}; {read_as[form]}, {known[0].shape[1]} numbers",
                "labels": probe.said,
            } | ({"warning": "; ".join(spoken)} if spoken else {})
    return numbers
