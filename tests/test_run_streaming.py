"""The real command line with tar shards: train, evaluate, go on where it stopped, two processes, wrong uses."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import run_xmatching
from imagedex import command_line
from imagedex.modeling.modeling_xmatching import XMatchingModel

ROOT = Path(__file__).resolve().parents[1]
TWO_PROCESSES = (sys.executable, "-m", "accelerate.commands.launch", "--config_file",
                 str(ROOT / "accelerate_configs" / "cpu_two_processes.yaml"))  # fmt: skip


@pytest.fixture
def arguments(flickr_shards, flickr_folder, tmp_path, text_config, vision_config):
    """Eight batches of twelve: two passes over the 48 captions; later flags override earlier ones."""
    with open(tmp_path / "validation.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), ("red_blue.jpg", "red here"), ("blue_red.jpg", "blue here")])
    return [
        "--streaming", "--dataset_name", flickr_shards, "--shuffle_buffer_size", 10, "--max_steps", 8,
        "--validation_file", tmp_path / "validation.csv", "--image_dir", flickr_folder / "images",
        "--output_dir", tmp_path / "out", "--text_config", json.dumps(text_config),
        "--vision_config", json.dumps(vision_config), "--image_size", 16, "--text_pooling", "mean",
        "--text_pooling_layers", 1, "--projection_dim", 16, "--loss_type", "info_nce", "--freeze_text_tower", "false",
        "--freeze_vision_tower", "false", "--image_augmentation", "random_resized_crop", "--do_train", "--do_eval",
        "--use_cpu", "--per_device_train_batch_size", 12, "--save_strategy", "steps", "--save_steps", 5,
        "--learning_rate", "1e-3", "--report_to", "none",
    ]  # fmt: skip


def test_train_stop_go_on(launch, arguments, tmp_path):
    out = tmp_path / "out"
    whole = launch("run_xmatching.py", *arguments)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert "webdataset stream of 4 shards, pictures from jpg, captions from json.caption" in whole.stdout
    assert "the tokenizer is trained on the first captions of the stream" in whole.stdout
    results = json.loads((out / "eval_results.json").read_text())
    assert results["eval_queries"] == 2 and results["eval_gallery_size"] == 2
    assert len((out / "eval_queries.csv").read_text().splitlines()) == 3
    assert "Trained on shards: a webdataset stream of 4 shards." in (out / "README.md").read_text()
    expected = XMatchingModel.from_pretrained(out).state_dict()

    # what a kill after the fifth step leaves (in the second pass): the record and the checkpoint
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copytree(out / "checkpoint-5", broken / "checkpoint-5")
    shutil.copy(out / "run_arguments.json", broken)
    resumed = launch("run_xmatching.py", *arguments, "--output_dir", broken)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "going on from" in resumed.stdout
    found = XMatchingModel.from_pretrained(broken).state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)

    # and a run that has ended stays as it is
    again = launch("run_xmatching.py", *arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    found = XMatchingModel.from_pretrained(out).state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_two_processes_of_two_workers_and_a_broken_picture(launch, arguments, flickr_shards, write_shard, tmp_path):
    files = [(f"{i}.jpg", b"broken") for i in range(3)] + [(f"{i}.json", {"caption": "c"}) for i in range(3)]
    write_shard(flickr_shards / "00003.tar", sorted(files))  # in place of three pictures that could be read
    workers = [
        "--dataloader_num_workers",
        2,
        "--per_device_train_batch_size",
        6,
        "--max_steps",
        4,
        "--save_strategy",
        "no",
    ]
    pattern = str(flickr_shards / "{00000..00003}.tar")
    shards = ["--train_file", pattern, "--dataset_name", "", "--shuffle_buffer_size", 0, *workers]
    stopped = launch("run_xmatching.py", *arguments, *shards, launcher=TWO_PROCESSES)
    assert stopped.returncode != 0
    said = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
    assert said and all("of sample 0 of" in line and "00003.tar cannot be read" in line for line in said), (
        stopped.stderr
    )

    # the shard is nobody's whole share any more when each process reads two with one worker
    going_on = ["--unreadable_images", "skip", "--dataloader_num_workers", 1]
    done = launch("run_xmatching.py", *arguments, *shards, *going_on, launcher=TWO_PROCESSES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "left out 3 pictures of the stream, unreadable or without caption" in done.stdout
    assert "eval_hits@1" in json.loads((tmp_path / "out" / "eval_results.json").read_text())


def test_without_anything_to_evaluate_on(launch, arguments, tmp_path):
    alone = [*arguments, "--validation_file", "", "--max_steps", 1, "--dataloader_num_workers", 1]
    done = launch("run_xmatching.py", *alone)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "evaluation and the choice of the best checkpoint are off" in done.stdout
    assert not (tmp_path / "out" / "eval_results.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_steps", -1], "say with --max_steps"),
        (["--keep_pixels", "--image_augmentation", "none"], "--keep_pixels cannot be had with --streaming"),
        (["--dataset_name", "{}/nowhere"], "nowhere cannot be streamed"),
        (["--dataset_name", "", "--train_file", "{}/{{00003..00004}}.tar"], "00004.tar"),
        (["--caption_column", "words"], "has no caption column 'words'; its columns are jpg, json.caption, json.width"),
        (["--shuffle_buffer_size", -1], "give 0 or more"),
        (["--loss_type", "paired_hinge", "--per_device_train_batch_size", 7], "needs an even batch"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments, flickr_shards, tmp_path, monkeypatch, capfd, flags, message):
    flags = [str(flag).format(flickr_shards) if "{}" in str(flag) else str(flag) for flag in flags]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command_line.run(lambda: run_xmatching.main([*map(str, arguments), *flags]))
    lines = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    assert not os.path.exists(tmp_path / "out"), "something was written"
