"""Heads in closed form: as scipy and a plain loop solve them, chosen on held-out training pictures, ordinary heads afterwards."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.linear_model import Ridge
from torch.nn import functional as F

from imagedex.configuration.configuration_xmatching import XMatchingConfig
from imagedex.encoding.store import Store
from imagedex.errors import UserError
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.training.dual_encoder import head_start
from imagedex.training.dual_encoder.head_start import HeadFitter, Moments, Spectra, preferred, start_heads
from imagedex.training.kept import KeptStates, view_keys

PICTURES, D, E = 60, 9, 7


def kept(tmp_path, name, states, views=1):
    """States (views, rows, width) in a store, as a `Keeper` leaves them."""
    keys = np.stack([np.frombuffer(int(n).to_bytes(16, "little"), np.uint8) for n in range(len(states[0]))])
    store, every = Store(tmp_path / name, {"tower": name}), [view_keys(keys, view) for view in range(views)]
    for own, values in zip(every, states, strict=True):
        store.fill(own, lambda batches, v=values: ({name: v[batch]} for batch in batches), 10, rows_per_shard=20)
    return KeptStates(name, [store.rows(own) for own in every])


@pytest.fixture
def world(tmp_path):
    """Pictures and captions that both say something of a hidden cause; one to three captions a picture, in no order."""
    generator = np.random.default_rng(0)
    cause = generator.normal(size=(PICTURES, 4))
    x = (cause @ generator.normal(size=(4, D)) + 0.5 * generator.normal(size=(PICTURES, D)) + 3).astype(np.float32)
    owners = generator.permutation(np.repeat(np.arange(PICTURES), np.arange(PICTURES) % 3 + 1))
    noise = 0.5 * generator.normal(size=(len(owners), E))
    y = (cause[owners] @ generator.normal(size=(4, E)) + noise - 1).astype(np.float32)
    sides = {"texts": kept(tmp_path, "text_states", [y]), "pictures": kept(tmp_path, "image_states", [x])}
    return x, y, owners, SimpleNamespace(**sides, image_rows=owners)


class Pairs:
    def __init__(self, world):
        self.texts, self.pictures, self.image_rows = world.texts, world.pictures, world.image_rows

    def __len__(self):
        return len(self.image_rows)


NAMES = [f"{number}.jpg" for number in range(PICTURES)]


def moments_of(x, y, owners) -> Moments:
    moments = Moments.empty(x.shape[1], y.shape[1])
    moments.add(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(owners))
    return moments


def cosines(a, b):
    return F.normalize(torch.as_tensor(a).double(), dim=1) @ F.normalize(torch.as_tensor(b).double(), dim=1).T


def test_moments_are_those_of_the_pairs_and_add_up(world):
    x, y, owners, _ = world
    pairs_x, n = x[owners].astype(float), len(owners)
    whole = moments_of(x, y, owners)
    assert whole.count == n
    expected = {
        "x": pairs_x.sum(0),
        "y": y.astype(float).sum(0),
        "xx": pairs_x.T @ pairs_x,
        "yy": y.T.astype(float) @ y,
        "xy": pairs_x.T @ y,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(whole, name), value, rtol=1e-6)
    some = np.arange(n) < 40
    parts = [moments_of(x, y[rows], owners[rows]) for rows in (some, ~some)]
    for summed, own in zip((parts[0] + parts[1]).tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(summed, own)
    for rest, own in zip((whole - parts[1]).tensors(), parts[0].tensors(), strict=True):
        torch.testing.assert_close(rest, own, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("wide", "strength", "text_strength"), [("x", 0.5, 0.2), ("y", 0.5, 0.2), ("x", 3.0, 1.0)])
def test_cca_is_the_generalised_eigenproblem(world, wide, strength, text_strength):
    """Hotelling's form: Cxy Cyy^-1 Cyx w = rho^2 Cxx w, solved by scipy; each direction counts by its correlation squared."""
    x, y, owners, _ = world
    if wide == "y":
        x = x[:, :5]
    heads = Spectra(moments_of(x, y, owners)).cca(strength, text_strength)
    a, b = x[owners] - x[owners].mean(0), y - y.mean(0)
    n = len(a)
    cxx, cyy, cxy = a.T @ a / n, b.T @ b / n, a.T @ b / n
    cxx, cyy = (c + r * np.trace(c) / len(c) * np.eye(len(c)) for c, r in ((cxx, strength), (cyy, text_strength)))
    values, w = scipy.linalg.eigh(cxy @ np.linalg.solve(cyy, cxy.T), cxx)
    k = min(x.shape[1], E)
    values, w = values[::-1][:k], w[:, ::-1][:, :k]
    rho = np.sqrt(values)
    v = np.linalg.solve(cyy, cxy.T @ w) / rho  # unit in cyy
    expected = cosines((x - x[owners].mean(0)) @ w * rho, (y - y.mean(0)) @ v * rho)
    pictures, texts = heads.embed(torch.from_numpy(x), torch.from_numpy(y), k)
    torch.testing.assert_close((pictures @ texts.T).double(), expected, atol=2e-4, rtol=0)


def test_ridge_is_scikit_learns(world):
    x, y, owners, _ = world
    heads = Spectra(moments_of(x, y, owners)).ridge(0.7)
    pairs_x = x[owners].astype(float)
    penalty = 0.7 * np.trace(np.cov(pairs_x.T, bias=True)) / D * len(owners)
    fitted = Ridge(alpha=penalty).fit(pairs_x, y)
    expected = cosines(fitted.predict(x) - y.mean(0), y - y.mean(0))
    pictures, texts = heads.embed(torch.from_numpy(x), torch.from_numpy(y), E)
    torch.testing.assert_close((pictures @ texts.T).double(), expected, atol=2e-4, rtol=0)


def test_folds_are_apart_and_add_up_to_all(world, monkeypatch):
    x, y, owners, pairs = world
    monkeypatch.setattr(head_start, "CAPTIONS_AT_ONCE", 11)  # several blocks
    fitter = HeadFitter("cca", Pairs(pairs), NAMES, (1.0, 1.0), 7)
    for fold in range(head_start.FOLDS):
        rows = np.flatnonzero(fitter.fold_of[owners] == fold)
        for found, own in zip(
            fitter.moments[fold].tensors(), moments_of(x, y[rows], owners[rows]).tensors(), strict=True
        ):
            torch.testing.assert_close(found, own)
        pictures, texts, targets = fitter.judged[fold]
        assert len(pictures) == (fitter.fold_of == fold).sum() and len(texts) == len(rows)
        assert torch.equal(pictures[targets], torch.from_numpy(x[owners[rows]]))


def test_several_processes_add_up_to_one(world, monkeypatch):
    """Each process sees every other block; the reduction is a sum."""
    pairs = Pairs(world[3])
    monkeypatch.setattr(head_start, "CAPTIONS_AT_ONCE", 11)
    one = HeadFitter("cca", pairs, NAMES, (1.0, 1.0), 7).moments
    monkeypatch.setattr(head_start.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(head_start.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(head_start, "reduce", lambda moments: None)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(head_start.distributed, "get_rank", lambda rank=rank: rank)
        fitter = HeadFitter.__new__(HeadFitter)
        fitter.pairs, fitter.powers = pairs, (1.0, 1.0)
        fitter.fold_of = np.array(
            [int(head_start.hash_fraction("head start", name) * head_start.FOLDS) for name in NAMES]
        )
        parts.append(fitter.all_moments(pairs.image_rows))
    for a, b, whole in zip(*parts, one, strict=True):
        for summed, own in zip((a + b).tensors(), whole.tensors(), strict=True):
            torch.testing.assert_close(summed, own)


def test_settings_are_judged_on_pictures_that_were_not_fitted(world):
    x, y, owners, pairs = world
    fitter = HeadFitter("ridge", Pairs(pairs), NAMES, (1.0, 1.0), E)
    _, chosen, scale = fitter.fit()
    assert scale in head_start.LOGIT_SCALES and chosen.pictures == PICTURES and chosen.captions == len(owners)
    for row in chosen.tried:
        ranks = []
        for fold in range(head_start.FOLDS):
            inside = fitter.fold_of[owners] == fold
            heads = Spectra(moments_of(x, y[~inside], owners[~inside])).ridge(row["regularization"])
            shown = np.flatnonzero(fitter.fold_of == fold)
            scores = cosines(
                (x[shown] - heads.picture_mean.numpy()) @ heads.picture.numpy(), y[inside] - heads.text_mean.numpy()
            )
            own = [np.flatnonzero(shown == owner)[0] for owner in owners[inside]]
            ranks.append(np.mean([1 / (scores[:, i] >= scores[row, i]).sum().item() for i, row in enumerate(own)]))
        assert row["mrr"] == pytest.approx(np.mean(ranks), abs=1e-6)
    assert chosen.mrr >= 0.99 * max(row["mrr"] for row in chosen.tried)
    assert fitter.fit(0.25)[1].regularization == 0.25


def test_of_settings_that_cannot_be_told_apart_the_one_that_is_better_on_trained_pictures():
    rows = [(3.0, 96, 0.500), (1.0, 384, 0.496), (3.0, 384, 0.499), (0.1, 384, 0.40), (10.0, 384, 0.497)]
    tried = [{"regularization": r, "directions": d, "mrr": m} for r, d, m in rows]
    assert preferred(tried) == tried[1]


def model_for(**fields):
    torch.manual_seed(0)
    text = {"model_type": "bert", "hidden_size": E + 1, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 8, "vocab_size": 20}  # fmt: skip
    vision = {"model_type": "convnext", "hidden_sizes": [4, D], "depths": [1, 1], "num_stages": 2}
    return XMatchingModel(XMatchingConfig(text_config=text, vision_config=vision, head_dropout=0.0, **fields))


@pytest.fixture
def pairs_of_a_model(tmp_path):
    generator = np.random.default_rng(1)
    cause = generator.normal(size=(PICTURES, 4))
    owners = np.repeat(np.arange(PICTURES), 2)
    views = [cause @ generator.normal(size=(4, D)) + 0.1 * generator.normal(size=(PICTURES, D)) for _ in range(2)]
    texts = cause[owners] @ generator.normal(size=(4, E + 1))
    found = SimpleNamespace(
        texts=kept(tmp_path, "text_states", [texts.astype(np.float32)]),
        pictures=kept(tmp_path, "image_states", [view.astype(np.float32) for view in views], 2),
        image_rows=owners,
    )
    return Pairs(found)


def test_the_heads_are_ordinary_ones_of_the_model_and_travel(pairs_of_a_model, tmp_path, caplog):
    model = model_for(projection_dim=8, vision_head_power=0.5)
    with caplog.at_level("INFO"):
        chosen = start_heads(model, pairs_of_a_model, NAMES, "cca")
    assert f"{chosen.directions} directions" in caplog.text
    assert model.config.projection_dim == chosen.directions <= 8
    texts, pictures = pairs_of_a_model.texts.states(slice(0, 9)), pairs_of_a_model.pictures.states(slice(0, 9), 1)
    fitter = HeadFitter("cca", pairs_of_a_model, NAMES, (1.0, 0.5), 8)
    heads, _, scale = fitter.fit()
    roots = pictures.sign() * pictures.abs().sqrt()
    expected = heads.embed(roots, texts, chosen.directions)
    model.save_pretrained(tmp_path / "saved")
    for one in (model, XMatchingModel.from_pretrained(tmp_path / "saved")):
        with torch.no_grad():
            output = one.eval()(text_states=texts, image_states=pictures)
            lengths = one.vision_head(pairs_of_a_model.pictures.states(slice(None))).norm(dim=1)
        torch.testing.assert_close(output.image_embeds, expected[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(output.text_embeds, expected[1], atol=1e-4, rtol=0)
        assert one.logit_scale.exp().item() == pytest.approx(scale)
        assert 0.5 < lengths.mean() < 2  # what gradient steps expect
    assert all(p.requires_grad for p in model.vision_head.parameters())


def test_every_view_counts(pairs_of_a_model):
    fitter = HeadFitter("cca", pairs_of_a_model, NAMES, (1.0, 1.0), 8)
    assert sum(m.count.item() for m in fitter.moments) == 2 * len(pairs_of_a_model)
    both = [pairs_of_a_model.pictures.states(slice(None), view)[pairs_of_a_model.image_rows].sum(0) for view in (0, 1)]
    torch.testing.assert_close(sum(m.x for m in fitter.moments), sum(both).double(), rtol=1e-5, atol=1e-4)


def test_towers_that_say_the_same_of_everything_are_one_line(tmp_path):
    same = np.ones((PICTURES, D), np.float32)
    found = SimpleNamespace(
        texts=kept(tmp_path, "text_states", [np.random.default_rng(0).normal(size=(PICTURES, E)).astype(np.float32)]),
        pictures=kept(tmp_path, "image_states", [same]),
        image_rows=np.arange(PICTURES),
    )
    with pytest.raises(UserError, match="the same of every picture"):
        HeadFitter("cca", Pairs(found), NAMES, (1.0, 1.0), 7).fit()


def test_fewer_pictures_than_dimensions(tmp_path):
    generator = np.random.default_rng(0)
    few = 12
    found = SimpleNamespace(
        texts=kept(tmp_path, "text_states", [generator.normal(size=(few, 30)).astype(np.float32)]),
        pictures=kept(tmp_path, "image_states", [generator.normal(size=(few, 40)).astype(np.float32)]),
        image_rows=np.arange(few),
    )
    heads, chosen, _ = HeadFitter("cca", Pairs(found), NAMES[:few], (1.0, 1.0), 25).fit()
    assert chosen.directions <= 25 and all(value.isfinite().all() for value in (heads.picture, heads.text))


def test_what_cannot_start_in_closed_form_says_why(pairs_of_a_model):
    with pytest.raises(UserError, match="--vision_head linear"):
        start_heads(model_for(projection_dim=8, vision_head="mlp"), pairs_of_a_model, NAMES, "cca")
    with pytest.raises(UserError, match="--projection_dim 8, its width"):
        start_heads(model_for(projection_dim=6), pairs_of_a_model, NAMES, "ridge")
    unkept = SimpleNamespace(texts=[], pictures=[], image_rows=np.arange(3))
    with pytest.raises(UserError, match="--keep_states true"):
        start_heads(model_for(projection_dim=8), unkept, NAMES, "cca")
