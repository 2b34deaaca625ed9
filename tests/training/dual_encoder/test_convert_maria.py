"""BEST.pth of the original, rebuilt here from its layout, gives the same vectors after conversion."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, ResNetConfig, TimmWrapperConfig
from transformers.utils import is_timm_available

from imagedex import command_line
from imagedex.corpora import load_corpus
from imagedex.encoding.dual_encoder import load_dual_encoder
from imagedex.encoding.vectors import encode_images, encode_texts
from imagedex.errors import UserError
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.training.arguments import ModelArguments
from imagedex.training.dual_encoder import convert_maria
from imagedex.training.dual_encoder.arguments import XMatchingArguments
from imagedex.training.generative.arguments import T5Arguments
from imagedex.training.generative.checks import check_model
from imagedex.training.processors import build_processor
from imagedex.training.tokenizer import train_tokenizer
from imagedex.training.towers import build_model, check_towers

WIDTHS, DEPTHS, STEM = [16, 32], [2, 1], 8


class FrozenBatchNorm(nn.Module):
    """Batch normalisation whose four vectors are buffers: no num_batches_tracked in its state."""

    def __init__(self, width):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x):  # (B, C, h, w)
        scale = self.weight / (self.running_var + 1e-5).sqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class Block(nn.Module):
    """A ResNet block under torchvision's names: bottleneck (1-3-1, a quarter of the width inside) or basic (3-3)."""

    def __init__(self, before, width, stride, kind):
        super().__init__()
        inner, kernels = (width // 4, (1, 3, 1)) if kind == "bottleneck" else (width, (3, 3))
        widths = [before, *[inner] * (len(kernels) - 1), width]
        strided = kernels.index(3)  # the first 3x3
        self.depth = len(kernels)
        for n, kernel in enumerate(kernels):
            step = stride if n == strided else 1
            conv = nn.Conv2d(widths[n], widths[n + 1], kernel, step, kernel // 2, bias=False)
            setattr(self, f"conv{n + 1}", conv)
            setattr(self, f"bn{n + 1}", FrozenBatchNorm(widths[n + 1]))
        if before != width or stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), FrozenBatchNorm(width))

    def forward(self, x):
        kept = self.downsample(x) if hasattr(self, "downsample") else x
        for n in range(1, self.depth + 1):
            x = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(x))
            x = x.relu() if n < self.depth else x
        return (x + kept).relu()


class ResNet(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, STEM, 7, 2, 3, bias=False), FrozenBatchNorm(STEM)
        before = STEM
        for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True), start=1):
            blocks = []
            for n in range(depth):
                blocks.append(Block(before, width, 2 if stage > 1 and n == 0 else 1, kind))
                before = width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))

    def forward(self, x):
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for stage in range(1, len(DEPTHS) + 1):
            x = getattr(self, f"layer{stage}")(x)
        return x.mean((2, 3))


class MLP(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x):
        *hidden, last = self.linears
        for layer in hidden:
            x = layer(x).relu()
        return last(x)


class Side(nn.Module):
    def __init__(self, backbone, mlp):
        super().__init__()
        self.backbone, self.mlp = backbone, mlp


class Original(nn.Module):
    """lang_model.{backbone,mlp} and visn_model.{backbone,mlp}, in evaluation mode."""

    def __init__(self, bert_config, kind):
        super().__init__()
        bert = BertModel(bert_config)  # with its pooler, which is saved and not used
        # what transformers of that time kept among the weights
        bert.embeddings.register_buffer("position_ids", torch.arange(512)[None], persistent=True)
        self.lang_model = Side(bert, MLP(4 * bert_config.hidden_size, 20, 24, 12))
        self.visn_model = Side(ResNet(kind), MLP(WIDTHS[-1], 20, 24, 12))

    def text(self, input_ids, attention_mask):
        states = self.lang_model.backbone(input_ids, attention_mask, output_hidden_states=True).hidden_states
        vector = self.lang_model.mlp(torch.cat([states[layer] for layer in (-4, -3, -2, -1)], -1)[:, 0])
        return vector / vector.norm(dim=-1, keepdim=True)

    def image(self, pixels):
        vector = self.visn_model.mlp(self.visn_model.backbone(pixels))
        return vector / vector.norm(dim=-1, keepdim=True)


@pytest.fixture(params=["bottleneck", "basic"])
def original(request, tmp_path):
    """(the original's model, the flags that name its towers); BEST.pth lies in tmp_path."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["red beside blue", "a green half next to a yellow half"] * 9, 80)
    bert_config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32
    )
    bert_config.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    ResNetConfig(embedding_size=STEM, hidden_sizes=WIDTHS, depths=DEPTHS, layer_type=request.param).save_pretrained(
        tmp_path / "resnet"
    )
    model = Original(bert_config, request.param).eval()
    torch.save(model.state_dict(), tmp_path / "BEST.pth")
    flags = ["--text_model_name_or_path", tmp_path / "bert", "--vision_model_name_or_path", tmp_path / "resnet"]
    return model, list(map(str, flags))


def convert(tmp_path, flags, file="BEST.pth", output="out"):
    convert_maria.main([str(tmp_path / file), str(tmp_path / output), *flags])
    return XMatchingModel.from_pretrained(tmp_path / output)


def test_the_same_vectors(original, tmp_path, capsys):
    theirs, flags = original
    ours = convert(tmp_path, flags)
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    ids, pixels = torch.randint(3, 40, (2, 9)), torch.randn(3, 3, 64, 48)
    with torch.no_grad():
        found = ours.get_text_features(ids, mask).pooler_output, ours.get_image_features(pixels).pooler_output
        expected = theirs.text(ids, mask), theirs.image(pixels)
    assert expected[1].std(0).max() > 1e-3  # pictures are told apart, so that equality says something
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    said = capsys.readouterr().out
    names = ("embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight")
    unused = ", ".join(f"lang_model.backbone.{name}" for name in names)
    assert f"{len(theirs.state_dict()) - 3} tensors taken, 3 left out: {unused}\n" in said
    config = ours.config
    assert (config.text_pooling_layers, config.head_hidden_sizes, config.projection_dim) == (4, [20, 24], 12)
    assert (config.loss_type, config.loss_reduction, config.mask_same_image) == ("paired_hinge", "sum", False)
    assert config.freeze_text_tower and config.freeze_vision_tower


def test_the_folder_answers_questions_like_any_model_of_ours(original, tmp_path, flickr_folder):
    theirs, flags = original
    convert(tmp_path, flags)
    model = load_dual_encoder(str(tmp_path / "out"))
    corpus = load_corpus(str(flickr_folder)).splits["train"]
    images = encode_images(model.model, model.image_processor, corpus.select(range(3)), batch_size=2)
    pixels = model.image_processor([corpus[row]["image"] for row in range(3)], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, 224, 224)
    texts = encode_texts(model.model, model.tokenizer, ["red beside blue"])
    tokens = PreTrainedTokenizerFast.from_pretrained(tmp_path / "bert")("red beside blue", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(images, theirs.image(pixels), atol=1e-5, rtol=0)
        torch.testing.assert_close(texts, theirs.text(**tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("original", ["bottleneck"], indirect=True)
def test_saved_through_ddp_and_before_batch_norms_were_frozen(original, tmp_path):
    theirs, flags = original
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    state["module.visn_model.backbone.bn1.num_batches_tracked"] = torch.tensor(7)
    torch.save(state, tmp_path / "ddp.pth")
    plain, wrapped = convert(tmp_path, flags), convert(tmp_path, flags, "ddp.pth", "ddp")
    for name, value in plain.state_dict().items():
        assert torch.equal(wrapped.state_dict()[name], value), name


def without(name):
    return lambda state: state.pop(name)


def word_level(state):
    for n in (0, 1, 2):
        for part in ("weight", "bias"):
            state[f"lang_model.mlp.{3 * n}.{part}"] = state.pop(f"lang_model.mlp.linears.{n}.{part}")


WRONG = {
    "a weight is missing": (without("visn_model.backbone.layer1.0.bn2.bias"), "lacks 1 weights, the first is vision_model."),
    "another network": (lambda s: s.update({"visn_model.backbone.features.0.weight": torch.ones(2)}), "features.0.weight"),
    "a third model": (lambda s: s.update({"decoder.backbone.x": torch.ones(2)}), "the first is decoder.backbone.x"),
    "deeper": (lambda s: s.update({"visn_model.backbone.layer1.7.conv1.weight": torch.ones(2)}), "beyond the towers, 1"),
    "wider": (lambda s: s.update({"visn_model.backbone.conv1.weight": torch.ones(9, 3, 7, 7)}), "other shapes"),
    "words, not sentences": (word_level, "Vokenization's matcher of words"),
    "three layers": (lambda s: s.update({"lang_model.mlp.linears.0.weight": torch.ones(20, 50)}), "no multiple of"),
    "heads differ": (without("visn_model.mlp.linears.2.weight"), "the two heads differ"),
    "not tensors": (lambda s: s.update(epoch=3), "something else than tensors"),
}  # fmt: skip


@pytest.mark.parametrize("original", ["bottleneck"], indirect=True)
@pytest.mark.parametrize("name", WRONG)
def test_anything_else_is_refused_in_one_line(original, tmp_path, name):
    change, message = WRONG[name]
    state = dict(original[0].state_dict())
    change(state)
    torch.save(state, tmp_path / "BEST.pth")
    with pytest.raises(UserError, match=message) as caught:
        convert(tmp_path, original[1])
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["BEST.pth", "bert", "resnet"], "something was written"


@pytest.mark.parametrize("original", ["bottleneck"], indirect=True)
def test_wrong_uses_of_the_command(original, tmp_path, capsys):
    theirs, flags = original
    torch.save(theirs, tmp_path / "BEST.pth.model")  # a pickled program, as the original leaves it too
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for argv, message in [
        (["BEST.pth.model", "out", *flags], "give BEST.pth, not BEST.pth.model"),
        (["nothing.pth", "out", *flags], "cannot read"),
        (["BEST.pth", "full", *flags], "is not empty"),
        (["BEST.pth", "out", *flags[:3], str(tmp_path / "bert")], "not bert and bert"),
        (["BEST.pth", "out", *flags[:3], str(tmp_path / "nowhere")], "--vision_model_name_or_path"),
        (["BEST.pth"], "OUTPUT_DIR"),
    ]:
        argv = [str(tmp_path / argv[0]), *[str(tmp_path / name) for name in argv[1:2]], *argv[2:]]
        with pytest.raises(SystemExit) as stopped:
            command_line.run(lambda argv=argv: convert_maria.main(argv))
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        assert message in error
        assert not (tmp_path / "out").exists()


def torchvision_names():
    """The names in a torchvision resnext101_32x8d without fc; timm 1.0.31's are the same 624 (compared once, by running both)."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["conv1.weight", *(f"bn1.{part}" for part in norm)]
    for stage, depth in enumerate((3, 4, 23, 3), start=1):
        for block in range(depth):
            where = f"layer{stage}.{block}."
            for n in (1, 2, 3):
                names += [f"{where}conv{n}.weight", *(f"{where}bn{n}.{part}" for part in norm)]
            if block == 0:
                names += [f"{where}downsample.0.weight", *(f"{where}downsample.1.{part}" for part in norm)]
    return names


def test_names_of_timm_are_torchvision_s():
    names = torchvision_names()
    assert len(names) == 624
    for name in names:
        assert (
            convert_maria.our_name(f"visn_model.backbone.{name}", "timm_wrapper") == f"vision_model.timm_model.{name}"
        )


@pytest.mark.skipif(is_timm_available(), reason="timm is installed")
@pytest.mark.parametrize("original", ["bottleneck"], indirect=True)
def test_without_timm_one_line_says_so(tmp_path, original):
    TimmWrapperConfig(architecture="resnet18").save_pretrained(tmp_path / "timm")
    with pytest.raises(UserError, match="the towers cannot be made: .*timm") as caught:
        convert(tmp_path, [*original[1][:3], str(tmp_path / "timm")])
    assert "\n" not in str(caught.value)
    model = ModelArguments(
        vision_model_name_or_path=str(tmp_path / "timm"), image_processor_config={"size": {"shortest_edge": 8}}
    )
    text = XMatchingArguments(text_model_name_or_path=str(tmp_path / "bert"))
    with pytest.raises(UserError, match="timm") as caught:
        processor = build_processor(model, ("model_name_or_path", None), text.text_model_name_or_path, None, [], {})
        build_model(model, text, processor)
    assert "\n" not in str(caught.value)


def test_a_timm_tower(tmp_path, original):
    """Where timm is installed: its ResNet-18 under the original's names."""
    timm = pytest.importorskip("timm")
    flags = original[1]
    TimmWrapperConfig(architecture="resnet18", do_pooling=True).save_pretrained(tmp_path / "timm")
    backbone = timm.create_model("resnet18", num_classes=0).eval()
    theirs = original[0]
    theirs.visn_model = Side(backbone, MLP(512, 20, 24, 12))
    torch.save(theirs.state_dict(), tmp_path / "BEST.pth")
    ours = convert(tmp_path, [*flags[:3], str(tmp_path / "timm")])
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = ours.get_image_features(pixels).pooler_output
        torch.testing.assert_close(found, theirs.image(pixels), atol=1e-5, rtol=0)


@pytest.mark.skipif(is_timm_available(), reason="timm is installed")
def test_a_timm_tower_without_timm_is_one_line_before_anything_is_read(tmp_path):
    TimmWrapperConfig(architecture="resnet18").save_pretrained(tmp_path / "timm")
    model = ModelArguments(vision_model_name_or_path=str(tmp_path / "timm"))
    with pytest.raises(
        UserError, match=r"is a timm model, which needs timm and torchvision: pip install 'imagedex\[timm\]'"
    ):
        check_towers(model, XMatchingArguments(text_config={"model_type": "bert"}))
    with pytest.raises(UserError, match="is a timm model"):
        check_model(model, T5Arguments(model_type="codebook_t5", t5_config={"model_type": "t5"}))
