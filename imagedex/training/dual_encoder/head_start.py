"""Heads in closed form: where linear heads on frozen towers start, from kept states, in one pass and without a gradient.

"cca" is regularised canonical correlation analysis (Hotelling, 1936; for pictures and sentences Gong et al., 1212.4522): both
sides are whitened, turned so that their coordinates correlate pair by pair, and weighted by those correlations, so that the
cosine counts a direction by its correlation squared. "ridge" leaves the sentence space as it is, but for its mean, and maps
pictures into it by ridge regression.

That a closed form between frozen encoders needs few pairs is the finding of CSA (2410.07610; CCA) and SOTAlign (a linear teacher
before contrastive training, 2602.23353); SAIL (2412.04616) trains such heads by contrast alone, and wants many pairs.

Both need only means and covariances. These add up: over batches, so that memory is (width of a side)^2 however large the
corpus; and over processes, by one reduction. They are kept apart for five folds of the training pictures: each choice of
regularisation and directions is judged on pictures that it was not fitted to, and never by the figures that are reported.
"""

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn import functional as F

from imagedex.corpora.splits import hash_fraction
from imagedex.errors import UserError
from imagedex.evaluation.exact import ranks_by_blocks
from imagedex.files import write_atomically
from imagedex.training.kept import KeptStates

logger = logging.getLogger(__name__)

FILE = "head_start.json"  # beside a model: what was chosen
FOLDS = 5
CAPTIONS_AT_ONCE = 4096
JUDGED_PICTURES = 500  # of each fold; the figure they give is compared, not reported
REGULARIZATIONS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the pictures' side, in units of its mean variance
TEXT_REGULARIZATIONS = (0.3, 1.0, 3.0)
LOGIT_SCALES = (5.0, 7.0, 10.0, 14.0, 20.0, 28.0, 40.0, 56.0, 80.0)


@dataclass
class Moments:
    """Sums over caption-picture pairs, float64: count, picture states (D,), caption states (E,), and their products."""

    count: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    xx: torch.Tensor  # (D, D)
    yy: torch.Tensor  # (E, E)
    xy: torch.Tensor  # (D, E)

    @classmethod
    def empty(cls, picture_width: int, text_width: int) -> "Moments":
        shapes = ((), picture_width, text_width, (picture_width,) * 2, (text_width,) * 2, (picture_width, text_width))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, pictures: torch.Tensor, texts: torch.Tensor, owners: torch.Tensor) -> None:
        """Args: pictures (P, D); texts (T, E); owners (T,), the row in `pictures` of each caption's picture."""
        x, y = pictures.double(), texts.double()
        counts = torch.bincount(owners, minlength=len(x)).double()
        told = torch.zeros(len(x), y.shape[1], dtype=torch.float64).index_add_(
            0, owners, y
        )  # sum of a picture's captions
        weighted = x * counts[:, None]  # a picture counts once for each of its captions
        for total, part in zip(
            self.tensors(), (counts.sum(), weighted.sum(0), y.sum(0), weighted.T @ x, y.T @ y, x.T @ told), strict=True
        ):
            total += part

    def tensors(self) -> list[torch.Tensor]:
        return [self.count, self.x, self.y, self.xx, self.yy, self.xy]

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(*(a - b for a, b in zip(self.tensors(), other.tensors(), strict=True)))


@dataclass
class LinearHeads:
    """picture: (states - picture_mean) @ picture (D, k); caption: (states - text_mean) @ text (E, k); both float64."""

    picture_mean: torch.Tensor
    picture: torch.Tensor
    text_mean: torch.Tensor
    text: torch.Tensor

    def embed(self, pictures: torch.Tensor, texts: torch.Tensor, directions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors (P, directions) and (T, directions), float32."""
        sides = (pictures, self.picture_mean, self.picture), (texts, self.text_mean, self.text)
        return tuple(
            F.normalize((states.double() - mean) @ weight[:, :directions], dim=1).float()
            for states, mean, weight in sides
        )


class Spectra:
    """What all regularisations of one fit share: the eigenvectors of both covariances, and the cross-covariance between them."""

    def __init__(self, moments: Moments):
        n = moments.count
        self.picture_mean, self.text_mean = moments.x / n, moments.y / n
        self.picture_values, self.picture_vectors = eigen(moments.xx / n - self.picture_mean.outer(self.picture_mean))
        self.text_values, self.text_vectors = eigen(moments.yy / n - self.text_mean.outer(self.text_mean))
        for side, values in (("picture", self.picture_values), ("caption", self.text_values)):
            if not values.mean() > 1e-12:
                raise UserError(
                    f"--head_start: the towers say the same of every {side}, so no heads can be fitted to that"
                )
        cross = moments.xy / n - self.picture_mean.outer(self.text_mean)
        self.cross = self.picture_vectors.T @ cross @ self.text_vectors  # (D, E)

    def cca(self, regularization: float, text_regularization: float) -> LinearHeads:
        """Directions by falling correlation, each side's already multiplied by it."""
        picture = (self.picture_values + regularization * self.picture_values.mean()).rsqrt()
        text = (self.text_values + text_regularization * self.text_values.mean()).rsqrt()
        between = picture[:, None] * self.cross * text  # (D, E), its singular values are the correlations
        if between.shape[0] >= between.shape[1]:
            turned = eigen(between.T @ between)[1].flip(1)  # right singular vectors, the largest first
            left, right = between @ turned, turned * (between @ turned).norm(dim=0)
        else:
            turned = eigen(between @ between.T)[1].flip(1)
            left, right = turned * (between.T @ turned).norm(dim=0), between.T @ turned
        return self.heads(self.picture_vectors @ (picture[:, None] * left), self.text_vectors @ (text[:, None] * right))

    def ridge(self, regularization: float, text_regularization: float = 0.0) -> LinearHeads:
        """Pictures into the sentence space."""
        inverse = 1 / (self.picture_values + regularization * self.picture_values.mean())
        weight = self.picture_vectors @ (inverse[:, None] * self.cross) @ self.text_vectors.T
        return self.heads(weight, torch.eye(weight.shape[1], dtype=torch.float64))

    def heads(self, picture: torch.Tensor, text: torch.Tensor) -> LinearHeads:
        return LinearHeads(self.picture_mean, picture, self.text_mean, text)


def eigen(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, ascending and not below 0, and vectors of a symmetric matrix."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return values.clamp(min=0), vectors


@dataclass
class HeadStart:
    """What was chosen, and by which figure: the mean reciprocal rank of held-out training pictures in a gallery of their fold."""

    kind: str
    regularization: float
    text_regularization: float
    directions: int
    mrr: float
    pictures: int
    captions: int
    tried: list[dict]

    @classmethod
    def load(cls, folder: Path | str) -> "HeadStart | None":
        """What `save` wrote there; None where it has not."""
        path = Path(folder, FILE)
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def save(self, folder: Path | str) -> None:
        write_atomically(Path(folder, FILE), json.dumps(asdict(self), indent=2) + "\n")


class HeadFitter:
    """Fits heads of one kind ("cca" or "ridge") to a model's kept training states.

    Args:
        pairs: its `texts` and `pictures` are `KeptStates`.
        image_ids: of the pictures, by their rows.
        powers: of the heads, text and vision; see `Head`.
        directions: at most so many.
    """

    def __init__(self, kind: str, pairs, image_ids: Sequence[str], powers: tuple[float, float], directions: int):
        if not all(isinstance(side, KeptStates) for side in (pairs.texts, pairs.pictures)):
            raise UserError("--head_start needs the states of both towers: freeze both, and give --keep_states true")
        self.kind, self.pairs, self.powers = kind, pairs, powers
        owners = pairs.image_rows
        self.fold_of = np.array([int(hash_fraction("head start", name) * FOLDS) for name in image_ids])
        self.moments = self.all_moments(owners)
        widths = [len(side) for side in (self.moments[0].x, self.moments[0].y)]
        self.most_directions = widths[1] if kind == "ridge" else min(directions, *widths)
        if kind == "ridge" and directions != widths[1]:
            raise UserError(
                f"--head_start ridge maps pictures into the sentence space: give --projection_dim {widths[1]}, its width"
            )
        self.judged = [self.held_out(fold, owners, image_ids) for fold in range(FOLDS)]

    def states(self, side: KeptStates, rows, view: int = 0) -> torch.Tensor:
        """(rows, width) as they enter the head's layer."""
        states, power = side.states(rows, view).float(), self.powers[side is self.pairs.pictures]
        return states if power == 1 else states.sign() * states.abs() ** power

    def all_moments(self, owners: np.ndarray) -> list[Moments]:
        """Of each fold, over all captions and all views; each process adds up its share, and one reduction does the rest."""
        pairs, several = self.pairs, distributed.is_available() and distributed.is_initialized()
        rank, world = (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)
        first = [self.states(side, slice(0, 1)).flatten(1).shape[1] for side in (pairs.pictures, pairs.texts)]
        moments = [Moments.empty(*first) for _ in range(FOLDS)]
        for start in range(rank * CAPTIONS_AT_ONCE, len(owners), world * CAPTIONS_AT_ONCE):
            rows = np.arange(start, min(start + CAPTIONS_AT_ONCE, len(owners)))
            texts, folds = self.states(pairs.texts, rows), self.fold_of[owners[rows]]
            for view, fold in itertools.product(range(len(pairs.pictures.views)), range(FOLDS)):
                inside = np.flatnonzero(folds == fold)
                shown, owner = np.unique(owners[rows[inside]], return_inverse=True)
                if len(inside):
                    moments[fold].add(
                        self.states(pairs.pictures, shown, view), texts[inside], torch.from_numpy(owner.reshape(-1))
                    )
        if world > 1:
            reduce(moments)
        return moments

    def held_out(self, fold: int, owners: np.ndarray, image_ids: Sequence[str]):
        """(picture states, caption states, the picture of each caption) to judge a fit to the other folds by."""
        rows = np.flatnonzero(self.fold_of == fold)
        rows = sorted(rows.tolist(), key=lambda row: hash_fraction("judged", image_ids[row]))[:JUDGED_PICTURES]
        place = {row: number for number, row in enumerate(rows)}
        captions = [caption for caption, row in enumerate(owners.tolist()) if row in place]
        if not captions:
            return None
        targets = np.array([place[owners[caption]] for caption in captions])
        return self.states(self.pairs.pictures, rows), self.states(self.pairs.texts, captions), targets

    def fit(
        self, regularization: float | None = None, chosen: HeadStart | None = None
    ) -> tuple[LinearHeads, HeadStart, float]:
        """(heads of all training pairs with the best settings, what was chosen, a fitting inverse temperature).

        Args: regularization, of the pictures' side; None: chosen. chosen, what an earlier fit to the same pairs chose.
        """
        whole = sum(self.moments[1:], self.moments[0])
        folds = [
            fold for fold in range(FOLDS) if self.judged[fold] is not None and self.moments[fold].count < whole.count
        ]
        if not folds:
            raise UserError("--head_start needs more training pictures: settings are judged on some of them")
        spectra = {fold: Spectra(whole - self.moments[fold]) for fold in folds}
        chosen = chosen or self.choose(spectra, regularization)
        settings = chosen.regularization, chosen.text_regularization
        fitted = [getattr(spectra[fold], self.kind)(*settings) for fold in folds]
        heads = getattr(Spectra(whole), self.kind)(*settings)
        return heads, chosen, self.logit_scale(fitted, folds, chosen.directions)

    def choose(self, spectra: dict[int, Spectra], regularization: float | None) -> HeadStart:
        """The settings that find pictures held out from the fits best. Args: spectra, of all pictures but those of a fold."""
        texts = TEXT_REGULARIZATIONS if self.kind == "cca" else (0.0,)
        wanted = REGULARIZATIONS if regularization is None else (regularization,)
        widths = sorted({max(1, self.most_directions // part) for part in ((1, 2, 4) if self.kind == "cca" else (1,))})
        tried = []
        for strength, text_strength in itertools.product(wanted, texts):
            heads = {fold: getattr(own, self.kind)(strength, text_strength) for fold, own in spectra.items()}
            for width in widths:
                mrr = float(np.mean([self.mrr(own, fold, width) for fold, own in heads.items()]))
                tried.append(
                    {"regularization": strength, "text_regularization": text_strength, "directions": width, "mrr": mrr}
                )
        counts = {"pictures": len(np.unique(self.pairs.image_rows)), "captions": len(self.pairs)}
        return HeadStart(self.kind, **preferred(tried), **counts, tried=tried)

    def mrr(self, heads: LinearHeads, fold: int, directions: int) -> float:
        pictures, texts, targets = self.judged[fold]
        gallery, asked = heads.embed(pictures, texts, directions)
        return float(np.mean(1 / ranks_by_blocks(asked, gallery, targets)))

    def logit_scale(self, heads: list[LinearHeads], folds: list[int], directions: int) -> float:
        """The inverse temperature of the smallest InfoNCE loss on held-out pictures."""
        losses = np.zeros(len(LOGIT_SCALES))
        for fitted, fold in zip(heads, folds, strict=True):
            pictures, texts, targets = self.judged[fold]
            gallery, asked = fitted.embed(pictures, texts, directions)
            cosines = asked @ gallery.T
            losses += [F.cross_entropy(scale * cosines, torch.from_numpy(targets)).item() for scale in LOGIT_SCALES]
        return LOGIT_SCALES[int(losses.argmin())]


def preferred(tried: list[dict]) -> dict:
    """Of the settings that find new pictures about as well as the best (to a hundredth of its figure, less than judging can
    tell), the one with the most directions and the least regularisation: these find trained pictures better."""
    enough = 0.99 * max(row["mrr"] for row in tried)
    good = [row for row in tried if row["mrr"] >= enough]
    return max(good, key=lambda row: (row["directions"], -row["regularization"], row["mrr"]))


def reduce(moments: list[Moments]) -> None:
    """Sums of all processes, in place, by one reduction."""
    tensors = [tensor for own in moments for tensor in own.tensors()]
    device = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(device)
    distributed.all_reduce(flat)
    for tensor, part in zip(tensors, flat.cpu().split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def start_heads(
    model,
    pairs,
    image_ids: Sequence[str],
    kind: str,
    regularization: float | None = None,
    chosen: HeadStart | None = None,
) -> HeadStart:
    """Puts fitted heads into the model, as its ordinary linear heads, and says in the log what was chosen. Raises `UserError`.

    Args: see `HeadFitter`.
    """
    config = model.config
    if (config.text_head, config.vision_head) != ("linear", "linear"):
        raise UserError(f"--head_start {kind} makes linear heads: give --text_head linear and --vision_head linear")
    powers = config.text_head_power, config.vision_head_power
    fitter = HeadFitter(kind, pairs, image_ids, powers, config.projection_dim)
    heads, chosen, scale = fitter.fit(regularization, chosen)
    config.projection_dim = chosen.directions
    some = np.arange(min(len(pairs), CAPTIONS_AT_ONCE))
    for head, side, mean, weight, rows in (
        (model.text_head, pairs.texts, heads.text_mean, heads.text, some),
        (model.vision_head, pairs.pictures, heads.picture_mean, heads.picture, pairs.image_rows[some]),
    ):
        weight = weight[:, : chosen.directions]
        states = fitter.states(side, rows).double()
        weight = (
            weight / ((states - mean) @ weight).norm(dim=1).mean()
        )  # outputs of length 1, a scale that gradient steps expect
        layer = torch.nn.Linear(len(mean), chosen.directions)
        layer.weight.copy_(weight.T)
        layer.bias.copy_(-mean @ weight)
        head.layers[0] = layer.to(head.layers[0].weight)
    if model.logit_scale is not None:
        model.logit_scale.fill_(float(np.log(scale)))
    logger.info(
        "heads in closed form (%s), from %d captions of %d pictures: regularisation %g for pictures, %g for captions, %d "
        "directions; MRR %.3f on training pictures that were held out to choose these",
        kind, chosen.captions, chosen.pictures, chosen.regularization, chosen.text_regularization, chosen.directions, chosen.mrr,
    )  # fmt: skip
    return chosen
