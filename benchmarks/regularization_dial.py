r"""Pictures learned by heart against pictures never seen: heads in closed form over their regularisation, and forms against hubs.

    python benchmarks/regularization_dial.py -- --dataset_name my_photos \
        --text_model_name_or_path DIR --vision_model_name_or_path DIR

Two protocols of the recipe photos/xmatching_pretrained, each over several `--split_seeds`. New pictures: a ninth of the pictures
is held out with all its captions, which are asked among the new pictures alone and among all. Indexed pictures: all pictures are
trained, one caption of each is held out and asked among all. Heads are CCA's with every direction. Towers read each picture
once for all of it (--keep_states), so after the first split a point costs seconds. What follows `--` goes to the recipe.
"""

import argparse
import csv
import importlib.metadata
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from gradient_cache_memory import hardware
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import run_xmatching  # noqa: E402
from imagedex import command_line  # noqa: E402
from imagedex.corpora import load_splits, training_captions  # noqa: E402
from imagedex.evaluation.exact import ranks_by_blocks, with_bias  # noqa: E402
from imagedex.modeling.caption_bank import CaptionBank  # noqa: E402
from imagedex.training.dual_encoder.data import DualEncoderRows  # noqa: E402
from imagedex.training.dual_encoder.head_start import HeadFitter, LinearHeads, Spectra  # noqa: E402
from imagedex.training.processors import build_processor  # noqa: E402
from imagedex.training.towers import build_model  # noqa: E402

RECIPE = ROOT / "recipes/photos/xmatching_pretrained.yaml"
PROTOCOLS = {"new": ["--held_out_images", "0.111"], "indexed": ["--held_out_captions_per_image", "1"]}
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
TEXT_STRENGTH = 1.0
FIGURES = ("hits@1", "hits@10")
COLUMNS = (
    "form",
    "regularization",
    "bias",
    "asked",
    "gallery",
    *FIGURES,
    "splits",
    "hardware",
    "torch",
    "transformers",
)


class Split:
    """Kept states of one protocol and split: what is trained, the gallery, the captions asked."""

    def __init__(self, protocol: str, seed: int, extra: list[str]):
        with tempfile.TemporaryDirectory() as folder:
            flags = [*PROTOCOLS[protocol], "--split_seed", str(seed), "--output_dir", folder, *extra]
            given = command_line.parse_arguments(run_xmatching.ARGUMENTS, run_xmatching.__doc__, [str(RECIPE), *flags])
            model_args, xmatching_args, data, args = given
            splits = load_splits(data)
            text_tower, style = xmatching_args.text_model_name_or_path, {"max_text_length": data.max_text_length}
            whole = "model_name_or_path", None
            processor = build_processor(model_args, whole, text_tower, None, training_captions(splits), style)
            model = build_model(model_args, xmatching_args, processor)
            rows = DualEncoderRows(splits, model, processor, data, args)
            self.train, evaluation = rows.training(), rows.evaluation()
            rows.keep_states(self.train, evaluation)
        powers, names = (model.config.text_head_power, model.config.vision_head_power), splits.train["image_id"][:]
        self.fitter = HeadFitter("cca", self.train, names, powers, 10**9)
        moments = self.fitter.moments
        self.spectra = Spectra(sum(moments[1:], moments[0]))
        trained = set(names)
        self.is_new = torch.tensor([name not in trained for name in splits.gallery["image_id"]])
        self.place = {name: row for row, name in enumerate(splits.gallery["image_id"])}
        self.trained_rows = torch.tensor([self.place[name] for name in names])
        power = powers[1]
        pictures = evaluation.pictures.states(slice(None)).float()
        self.pictures = pictures.sign() * pictures.abs() ** power
        self.asked, self.targets = evaluation.texts.states(slice(None)).float(), evaluation.targets
        self.told, self.owners = self.train.texts.states(slice(None)).float(), torch.from_numpy(self.train.image_rows)


def joined(*heads: tuple[LinearHeads, float]):
    """Several heads side by side, their cosines weighted. Returns embed(pictures, texts)."""

    def embed(pictures, texts):
        sides = [one.embed(pictures, texts, 10**9) for one, _ in heads]
        return tuple(
            F.normalize(
                torch.cat([side[which] * weight**0.5 for side, (_, weight) in zip(sides, heads, strict=True)], 1), dim=1
            )
            for which in (0, 1)
        )

    return embed


def forms(spectra: Spectra) -> dict:
    """(form, regularisation of the pictures' side) -> embed."""
    cca = {strength: spectra.cca(strength, TEXT_STRENGTH) for strength in STRENGTHS}
    found = {("cca", strength): joined((heads, 1.0)) for strength, heads in cca.items()}
    found |= {("ridge", strength): joined((spectra.ridge(strength), 1.0)) for strength in STRENGTHS}
    found["cca of 3 beside cca of 0.1", 3.0] = joined((cca[3.0], 1.0), (cca[0.1], 1.0))
    found["cca of 3 beside ridge of 1", 3.0] = joined((cca[3.0], 1.0), (spectra.ridge(1.0), 0.5))
    return found


def biases(pictures: torch.Tensor, bank: torch.Tensor) -> dict[str, torch.Tensor]:
    """Forms against hubs, each (N,) taken off cosines."""
    cosines = pictures @ bank.T
    found = {"none": torch.zeros(len(pictures))}
    found |= {f"csls, {k} nearest": CaptionBank(bank, k).bias(pictures) for k in (1, 5, 20, 100)}
    for beta in (10, 20, 40):  # querybank normalisation: the logarithm of an inverted softmax
        found[f"inverted softmax, {beta}"] = torch.logsumexp(beta * cosines, 1) / beta / (1 if beta == 10 else 2)
    return found | {"mean of the bank": cosines.mean(1)}


def figures(asked, pictures, bias, targets) -> list[float]:
    ranks = ranks_by_blocks(*with_bias(asked, pictures, bias), targets)
    return [float((ranks <= k).mean()) for k in (1, 10)]


def points(protocol: str, split: Split, every_bias: bool) -> dict[tuple, list[float]]:
    """(form, regularisation, bias, asked, gallery) -> Hits@1, Hits@10."""
    found = {}
    for (form, strength), embed in forms(split.spectra).items():
        pictures, asked = embed(split.pictures, split.asked)
        _, bank = embed(split.pictures[:1], split.told)
        every = biases(pictures, bank)
        for name in every if every_bias and (form, strength) == ("cca", 3.0) else ("none", "csls, 5 nearest"):
            key = form, strength, name
            found[(*key, protocol, "all")] = figures(asked, pictures, every[name], split.targets)
            if protocol == "new":
                rows = split.is_new.nonzero()[:, 0]
                local = torch.searchsorted(rows, torch.from_numpy(split.targets)).numpy()
                found[(*key, protocol, "new")] = figures(asked, pictures[rows], every[name][rows], local)
            else:
                means = torch.zeros(len(split.train.pictures), bank.shape[1]).index_add_(0, split.owners, bank)
                both = pictures.clone()
                both[split.trained_rows] += F.normalize(means, dim=1)
                both = F.normalize(both, dim=1)
                bias = biases(both, bank)[name]
                found[(*key, protocol, "all, joined with captions")] = figures(asked, both, bias, split.targets)
    return found


def draw(rows: list[dict], path: Path) -> None:
    """The curve: indexed against new pictures, a point a regularisation."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "imagedex"  # the same drawing is the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
    for form, marker in (("cca", "o"), ("ridge", "s")):
        for bias, style in (("none", ":"), ("csls, 5 nearest", "-")):
            value = {
                (row["regularization"], row["asked"]): row["hits@1"]
                for row in rows
                if (row["form"], row["bias"]) == (form, bias)
                and row["gallery"] in ("new", "all")
                and not (row["asked"] == "new" and row["gallery"] == "all")
            }
            curve = [(value[strength, "indexed"], value[strength, "new"]) for strength in STRENGTHS]
            axes.plot(
                *zip(*curve, strict=True),
                style,
                marker=marker,
                label=f"{form}, {'cosines' if bias == 'none' else 'CSLS'}",
            )
            if bias != "none":
                for strength, point in zip(STRENGTHS, curve, strict=True):
                    axes.annotate(f"{strength:g}", point, textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set_xlabel("indexed pictures, new captions: Hits@1")
    axes.set_ylabel("new pictures, among the new: Hits@1")
    axes.set_title("Learned by heart, or never seen: the regularisation decides", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main():
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split_seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args, extra = parser.parse_args(argv[:split]), argv[split + 1 :]
    if "--dataset_name" not in extra:
        parser.error("which photographs? End the command with: -- --dataset_name FOLDER")
    found: dict[tuple, list] = {}
    for protocol in PROTOCOLS:
        for seed in args.split_seeds:
            for key, values in points(protocol, Split(protocol, seed, extra), every_bias=True).items():
                found.setdefault(key, []).append(values)
    versions = {"hardware": hardware(), **{name: importlib.metadata.version(name) for name in COLUMNS[-2:]}}
    rows = []
    for key, values in found.items():
        means = dict(zip(FIGURES, np.mean(values, 0).round(4).tolist(), strict=True))
        rows.append(dict(zip(COLUMNS, key, strict=False)) | means | {"splits": len(values)} | versions)
        print(
            "  ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in (*key, *means.values()))
        )
    path = args.results_dir / f"regularization_dial-{hardware()}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, path.with_suffix(".svg"))
    print(path)


if __name__ == "__main__":
    main()
