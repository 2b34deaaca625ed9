"""A run that was stopped and goes on ends, bit for bit, where an unbroken one does; also when it was stopped within an epoch."""

import json
import shutil

import pytest
from resuming import BESIDE, T5, VIT, check_same, figures, run, write_documents
from tiny_models import tiny_tokenizer
from transformers import BertConfig, BertModel, ViTConfig, ViTImageProcessorPil, ViTModel

import run_dsi
import run_image_indexing
import run_xmatching
from imagedex.errors import UserError
from imagedex.training.whole_checkpoints import write_manifest

STEPS = 7  # of two epochs or more: the checkpoints lie within epochs and between them


@pytest.fixture
def documents(tmp_path):
    return write_documents(tmp_path / "documents")


@pytest.fixture
def towers(tmp_path):
    """Folders of two pretrained towers."""
    small, tokenizer = (
        {name: value for name, value in VIT.items() if "size" in name or "num" in name},
        tiny_tokenizer(24),
    )
    text = BertConfig(**small, vocab_size=len(tokenizer), max_position_embeddings=24)
    BertModel(text).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    ViTModel(ViTConfig(**small, image_size=16)).save_pretrained(tmp_path / "vision")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vision")
    return ["--text_model_name_or_path", tmp_path / "text", "--vision_model_name_or_path", tmp_path / "vision"]


@pytest.fixture
def commands(flickr_folder, documents, towers, tmp_path, text_config, vision_config):
    """name -> (script, arguments): each recipe's kind, in which everything is drawn that can be."""
    common = ["--do_train", "--do_eval", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--max_steps", STEPS,
              "--save_strategy", "steps", "--save_steps", 1, "--eval_strategy", "epoch", "--logging_steps", 1,
              "--learning_rate", "3e-3", "--keep_dir", tmp_path / "kept"]  # fmt: skip
    pictures = ["--dataset_name", flickr_folder, "--held_out_captions_per_image", 1, *common]
    t5, vit, small = ["--t5_config", json.dumps(T5)], ["--vision_config", json.dumps(VIT)], ["--image_size", 16]
    scratch = ["--text_config", json.dumps(text_config), "--vision_config", json.dumps(vision_config), *small]
    asked = ["--caption_word_dropout", 0.2, "--caption_mixing", 0.5, "--indexing_ratio", 0.7,
             "--per_device_train_batch_size", 20, *pictures]  # fmt: skip
    codebook = ["--model_type", "codebook_t5", *t5, *vit, *small]
    grounded = ["--model_type", "vision_grounded_t5", *t5, *vit, *small, *pictures, "--per_device_train_batch_size", 5]
    augmented = ["--image_augmentation", "random_resized_crop"]
    return {
        "codebook_t5": (run_dsi, [*codebook, *asked, "--keep_states"]),
        "codebook_t5 learned": (run_dsi, [*codebook, *asked, *augmented, "--quantization", "learned",
                                          "--freeze_vision_tower", "false", "--identifier_scheme", "rq",
                                          "--teacher_model_name_or_path", tmp_path / "text",
                                          "--teacher_invented_share", 0.5]),
        "captioning": (run_image_indexing, [*codebook, *pictures, *augmented, "--objective", "caption",
                                            "--quantization", "learned", "--per_device_train_batch_size", 12]),
        "indexing": (run_image_indexing, [*grounded, *augmented, "--t5_start", "lexical"]),
        "retrieval": (run_dsi, ["--model_name_or_path", tmp_path / "indexed", *asked, "--keep_states",
                                "--freeze_vision_tower", "true"]),
        "documents": (run_dsi, ["--model_type", "t5", *t5, "--dataset_name", documents, *common,
                                "--caption_word_dropout", 0.2, "--per_device_train_batch_size", 5]),
        "xmatching": (run_xmatching, [*scratch, "--projection_dim", 16, *pictures, *augmented,
                                      "--per_device_train_batch_size", 12]),
        "xmatching kept": (run_xmatching, [*towers, "--head_start", "cca", "--keep_states", *augmented, "--kept_views", 2,
                                           "--projection_dim", 16, *pictures, "--per_device_train_batch_size", 12]),
        "xmatching lora": (run_xmatching, [*towers, "--lora_rank", 2, "--lora_dropout", 0.1, *pictures,
                                           "--per_device_train_batch_size", 12]),
    }  # fmt: skip


NAMES = ["codebook_t5", "codebook_t5 learned", "captioning", "indexing", "retrieval", "documents", "xmatching",
         "xmatching kept", "xmatching lora"]  # fmt: skip


@pytest.fixture
def unbroken(commands, tmp_path, monkeypatch):
    """unbroken(name) -> the folder of the whole run, with a checkpoint of every step."""
    monkeypatch.chdir(tmp_path)

    def train(name):
        script, arguments = commands[name]
        if name == "retrieval":
            run(*commands["indexing"][:1], [*commands["indexing"][1], "--max_steps", 1, "--output_dir", "indexed"])
        run(script, [*arguments, "--output_dir", "whole"])
        return tmp_path / "whole"

    return train


def stopped(whole, step):
    """A folder as a run leaves it that is killed after the checkpoint of that step."""
    folder = whole.parent / f"stopped-{step}" / whole.name  # its card has the name
    folder.mkdir(parents=True)
    shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copy(whole / "run_arguments.json", folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_goes_on_ends_where_an_unbroken_one_does(commands, unbroken, name):
    whole = unbroken(name)
    script, arguments = commands[name]
    per_epoch = round(STEPS / json.loads((whole / "trainer_state.json").read_text())["epoch"])
    assert 2 <= per_epoch < STEPS - 1
    for step in (per_epoch, per_epoch + 1):  # between two epochs, and within the second
        folder = stopped(whole, step)
        run(script, [*arguments, "--output_dir", folder])
        check_same(folder, whole)
    (folder / "eval_results.json").unlink()  # the training is over, and what is missing is done
    run(script, [*arguments, "--output_dir", folder])
    check_same(folder, whole, BESIDE - ({"README.md"} if "lora" in name else set()))  # merged, it has fewer parameters


def test_what_is_kept_is_of_the_tower_that_is_saved(commands, unbroken):
    """Of a run that was stopped nothing is kept anew; its model remembers the pictures by itself, too, without kept states."""
    whole = unbroken("codebook_t5")
    script, arguments = commands["codebook_t5"]
    kept = whole.parent / "kept"
    before = {path: path.read_bytes() for path in sorted(kept.rglob("*")) if path.is_file()}
    folder = stopped(whole, 3)
    run(script, [*arguments, "--output_dir", folder])
    assert {path: path.read_bytes() for path in sorted(kept.rglob("*")) if path.is_file()} == before
    place = arguments.index("--dataset_name")
    judge = ["--model_name_or_path", folder, *arguments[place : place + 4], "--do_eval", "--use_cpu"]
    run(script, [*judge, "--output_dir", "judged", "--report_to", "none"])
    measured = figures(whole)
    for name, value in figures(whole.parent / "judged").items():
        assert name == "epoch" or value == pytest.approx(measured[name]), name


def test_a_run_goes_on_from_its_last_whole_checkpoint(commands, unbroken, capfd):
    """Killed while it writes one, a run leaves a torn one behind."""
    whole = unbroken("documents")
    script, arguments = commands["documents"]
    folder = stopped(whole, 3)
    shutil.copytree(whole / "checkpoint-4", folder / "checkpoint-4", ignore=lambda *_: ["trainer_state.json"])
    run(script, [*arguments, "--output_dir", folder])
    said = capfd.readouterr().out
    assert "checkpoint-4 is not whole and is passed over: trainer_state.json is not there" in said
    assert f"going on from {folder / 'checkpoint-3'}" in said
    check_same(folder, whole)


@pytest.mark.parametrize("name", ["codebook_t5", "xmatching kept"])
def test_states_are_not_kept_of_a_model_that_cannot_be_read(commands, unbroken, name):
    whole = unbroken(name)
    script, arguments = commands[name]
    folder = stopped(whole, 3)
    (folder / "checkpoint-3" / "model.safetensors").rename(folder / "checkpoint-3" / "pytorch_model_fsdp.bin")
    write_manifest(folder / "checkpoint-3")  # as sharded trainings leave it
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match="--keep_states: .*checkpoint-3 holds no whole model"):
        run(script, [*arguments, "--output_dir", folder])
    assert sorted(folder.rglob("*")) == before
