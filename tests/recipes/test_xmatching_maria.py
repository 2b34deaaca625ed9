"""Maria's recipe piece by piece: its values, the model it makes, one optimiser step, and a whole run on small towers."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, BertModel, ResNetModel

from imagedex import command_line
from imagedex.corpora import load_corpus
from imagedex.corpora.arguments import DataArguments
from imagedex.training.arguments import ModelArguments
from imagedex.training.augmentation import build_augmentation
from imagedex.training.dual_encoder import convert_maria
from imagedex.training.dual_encoder.arguments import XMatchingArguments, XMatchingTrainingArguments
from imagedex.training.dual_encoder.data import CaptionPairs, Collator, token_rows, tokenize_captions
from imagedex.training.dual_encoder.trainer import XMatchingTrainer
from imagedex.training.pictures import Pictures
from imagedex.training.processors import build_processor
from imagedex.training.tokenizer import train_tokenizer
from imagedex.training.towers import build_model, check_towers

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "coco" / "xmatching_maria.yaml"
GROUPS = (ModelArguments, XMatchingArguments, DataArguments, XMatchingTrainingArguments)

# What the original's run_xmatching.bash, main.py, model.py, loss.py and data.py show.
ORIGINAL = {
    "text_model_name_or_path": "bert-base-uncased", "vision_model_name_or_path": "timm/resnext101_32x8d.tv_in1k",
    "freeze_text_tower": True, "freeze_vision_tower": True, "text_pooling": "first", "text_pooling_layers": 4,
    "head_hidden_sizes": [1024, 1024], "projection_dim": 512, "head_dropout": 0.2, "loss_type": "paired_hinge",
    "loss_margin": 0.5, "loss_reduction": "sum", "mask_same_image": False, "negatives": "local", "max_text_length": 75,
    "image_augmentation": "random_resized_crop", "keep_pixels": False, "learning_rate": 1e-3, "weight_decay": 0.0,
    "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 5.0, "num_train_epochs": 25,
    "dataloader_drop_last": True, "shuffle_every_epoch": False, "per_device_eval_batch_size": 256,
    "gradient_accumulation_steps": 1, "bf16": False, "fp16": False, "eval_strategy": "epoch", "save_strategy": "epoch",
    "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False,
    "text_learning_rate": None, "vision_learning_rate": None, "held_out_captions_per_image": 0, "held_out_images": 0.0,
}  # fmt: skip


def parse(*flags):
    flags = [RECIPE, "--output_dir", "out", "--use_cpu", *flags]
    return command_line.parse_arguments(GROUPS, "", [str(flag) for flag in flags])


def test_each_setting_is_the_original_s():
    arguments = parse()
    values = {name: value for group in arguments for name, value in vars(group).items()}
    assert {name: values[name] for name in ORIGINAL} == ORIGINAL
    four_processes = 4 * values["per_device_train_batch_size"]
    assert four_processes == 512
    assert values["image_processor_config"] == convert_maria.IMAGE_PROCESSOR
    fields = arguments[1].config_fields()
    assert {name: fields[name] for name in convert_maria.MARIA} == convert_maria.MARIA


@pytest.fixture(scope="module")
def towers(tmp_path_factory, flickr_folder):
    """Small pretrained towers with a tokenizer, as flags."""
    folder = tmp_path_factory.mktemp("towers")
    captions = [caption for row in load_corpus(str(flickr_folder)).splits["train"]["captions"] for caption in row]
    tokenizer = train_tokenizer(captions, 200)
    tokenizer.save_pretrained(folder / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(AutoConfig.for_model("bert", vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "bert")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetModel(AutoConfig.for_model("resnet", **sizes)).save_pretrained(folder / "resnet")
    return ["--text_model_name_or_path", folder / "bert", "--vision_model_name_or_path", folder / "resnet"]


@pytest.fixture
def parts(towers, flickr_folder, tmp_path):
    """(arguments, model, training data, collator) of the recipe with small towers, a batch of 12, twelve pictures."""
    flags = ["--output_dir", tmp_path / "out", "--per_device_train_batch_size", 12, "--report_to", "none"]
    flags += ["--dataloader_num_workers", 0, "--disable_tqdm", "true", "--eval_strategy", "no", "--save_strategy", "no"]
    flags += ["--load_best_model_at_end", "false"]
    model_args, xmatching_args, data_args, args = parse(*towers, *flags)
    check_towers(model_args, xmatching_args)
    text_tower, style = xmatching_args.text_model_name_or_path, {"max_text_length": data_args.max_text_length}
    processor = build_processor(model_args, ("model_name_or_path", None), text_tower, data_args.image_size, [], style)
    torch.manual_seed(args.seed)
    model = build_model(model_args, xmatching_args, processor)
    corpus = load_corpus(str(flickr_folder)).splits["train"]
    tokens = tokenize_captions(corpus, processor).shuffle(seed=args.seed)
    augment = build_augmentation(data_args, processor.image_processor)
    pictures = Pictures(corpus, processor.image_processor, augment=augment)
    pairs = CaptionPairs(token_rows(tokens), pictures, tokens["image_row"])
    return args, model, pairs, Collator(processor.tokenizer)


def test_the_model_and_its_loss(parts):
    args, model, pairs, collator = parts
    assert [(layer.in_features, layer.out_features) for layer in model.text_head.layers] == [
        (4 * 16, 1024), (1024, 1024), (1024, 512)]  # fmt: skip
    assert [layer.out_features for layer in model.vision_head.layers] == [1024, 1024, 512]
    assert model.text_head.dropout.p == model.vision_head.dropout.p == 0.2
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"text_head", "vision_head"}

    batch = collator([pairs[row] for row in range(12)])
    assert batch["pixel_values"].shape == (12, 3, 224, 224)
    batch["image_ids"] = torch.tensor(
        [0, 1, 2, 3, 4, 5, 0, 7, 8, 9, 10, 11]
    )  # row 6 shows its partner's picture: counted
    with torch.no_grad():
        output = model.train()(**batch)
    texts, images = output.text_embeds.double().numpy(), output.image_embeds.double().numpy()
    expected = 0.0
    for row in range(12):
        partner = row + 6 if row < 6 else row - 6
        expected += max(0.0, 0.5 - texts[row] @ images[row] + texts[row] @ images[partner])
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


class Recorder(XMatchingTrainer):
    """Keeps the parameters before each step and the gradients of its loss, before they are clipped."""

    def training_step(self, model, inputs, *args, **kwargs):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        before = {name: p.detach().double().clone() for name, p in trained.items()}
        loss = super().training_step(model, inputs, *args, **kwargs)
        gradients = {name: p.grad.detach().double().clone() for name, p in trained.items()}
        self.steps = [*getattr(self, "steps", []), (before, gradients, inputs["image_ids"].tolist())]
        return loss


def test_three_steps_are_adam_on_clipped_gradients(parts):
    args, model, pairs, collator = parts
    args.max_steps, args.logging_steps = 3, 1
    trainer = Recorder(model=model, args=args, train_dataset=pairs, data_collator=collator)
    trainer.train()
    assert [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry] == [1e-3] * 3

    values = trainer.steps[0][0]
    theirs = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
    adam = torch.optim.Adam(theirs.values(), lr=1e-3)  # what the original calls
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in values.items()}
    after = [before for before, *_ in trainer.steps[1:]]
    after.append({name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad})
    for step, (_, gradients, _) in enumerate(trainer.steps, start=1):
        norm = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients.values()))
        if step == 1:
            assert norm > 5, "clipping is not put to the test"
        for name, gradient in gradients.items():
            clipped = gradient * min(1.0, 5.0 / norm)
            first, second = moments[name]
            first = 0.9 * first + 0.1 * clipped
            second = 0.999 * second + 0.001 * clipped**2
            moments[name] = first, second
            root = (second / (1 - 0.999**step)).sqrt() + 1e-8
            values[name] = values[name] - 1e-3 * (first / (1 - 0.9**step)) / root
            theirs[name].grad = clipped
        adam.step()
        for name, value in after[step - 1].items():
            # float32 against float64; a weight decay of 0.01 would already move a weight of 0.1 by 1e-6 a step
            torch.testing.assert_close(value, values[name], atol=5e-8, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(theirs[name].detach(), values[name], atol=1e-9, rtol=1e-9)


def test_every_epoch_has_the_same_batches_and_drops_the_last(parts):
    args, model, pairs, collator = parts
    args.num_train_epochs, args.per_device_train_batch_size = 3, 10
    trainer = Recorder(model=model, args=args, train_dataset=pairs, data_collator=collator)
    trainer.train()
    seen = [ids for *_, ids in trainer.steps]
    assert len(seen) == 3 * 4 and all(len(ids) == 10 for ids in seen)  # 48 captions, 8 left out
    assert seen[:4] == seen[4:8] == seen[8:]
    assert seen[0] != sorted(seen[0])


@pytest.fixture
def lxmert(tmp_path, flickr_folder):
    """data/lxmert and data/mscoco/images as the original's README lays them out, in the working directory of `launch`."""
    (tmp_path / "data/lxmert").mkdir(parents=True)
    corpus = load_corpus(str(flickr_folder)).splits["train"]
    rows = {}
    for number, row in enumerate(corpus):
        name, place = ("mscoco_minival", "val2014") if number % 4 == 3 else ("mscoco_train", "train2014")
        name = "mscoco_nominival" if number % 4 == 2 else name
        image_id = f"COCO_{place}_{number:012d}"
        target = tmp_path / "data/mscoco/images" / place / f"{image_id}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture = row["image"].convert("RGB").resize((80, 64), Image.Resampling.NEAREST)
        picture.save(target)
        rows.setdefault(name, []).append({"img_id": image_id, "labelf": {}, "sentf": {"mscoco": row["captions"]}})
    for name, content in rows.items():
        (tmp_path / "data/lxmert" / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_a_whole_run_on_small_towers(launch, towers, lxmert):
    flags = [*towers, "--per_device_train_batch_size", 12, "--per_device_eval_batch_size", 6, "--num_train_epochs", 3,
             "--dataloader_num_workers", 0, "--use_cpu", "--output_dir", "out"]  # fmt: skip
    done = launch("run_xmatching.py", RECIPE, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    out = lxmert / "out"
    results = json.loads((out / "eval_results.json").read_text())
    assert (results["eval_queries"], results["eval_gallery_size"]) == (12, 3)  # minival alone
    state = json.loads((out / "trainer_state.json").read_text())
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert len(losses) == 3 and state["best_metric"] == pytest.approx(min(losses))
    assert results["eval_loss"] == pytest.approx(min(losses), rel=1e-5)  # the model that is kept is the best one
    assert state["global_step"] == 3 * 36 // 12
