"""accelerate_configs/: accelerate's own parser reads every file, and the CPU ones start what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

CONFIGS = Path(__file__).resolve().parents[1] / "accelerate_configs"

# file -> (distributed type, use_cpu, processes, machines)
EXPECTED = {
    "cpu.yaml": (DistributedType.NO, True, 1, 1),
    "cpu_two_processes.yaml": (DistributedType.MULTI_GPU, True, 2, 1),
    "single_gpu.yaml": (DistributedType.NO, False, 1, 1),
    "multi_gpu.yaml": (DistributedType.MULTI_GPU, False, 4, 1),
    "fsdp2.yaml": (DistributedType.FSDP, False, 4, 1),
    "deepspeed_zero2.yaml": (DistributedType.DEEPSPEED, False, 4, 1),
    "multi_node.yaml": (DistributedType.MULTI_GPU, False, 16, 2),
}

# Each rank writes what the Trainer's arguments and accelerate say it is, and what the ranks add up to: 1 + 2 + ... only
# when they really talk to each other. Without use_cpu the Trainer would run two separate trainings of one rank each.
PROBE = """
import json, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from transformers import TrainingArguments
arguments = TrainingArguments(output_dir=sys.argv[1], use_cpu=True)
accelerator = Accelerator(cpu=True)
total = accelerator.reduce(torch.tensor(float(accelerator.process_index + 1)), reduction="sum")
world = [arguments.world_size, accelerator.num_processes]
report = {"world": world, "device": arguments.device.type, "sum": total.item()}
Path(sys.argv[1], f"rank{accelerator.process_index}.json").write_text(json.dumps(report))
accelerator.end_training()
"""


def test_every_file_is_expected_and_explained():
    files = {path.name for path in CONFIGS.glob("*.yaml")}
    assert files == set(EXPECTED)
    page = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert [name for name in sorted(files) if f"({name})" not in page] == []


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(CONFIGS / name))
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.use_cpu, config.num_processes, config.num_machines) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_launcher_accepts_it(name):
    """Nested keys (fsdp_config, deepspeed_config) are arguments of `accelerate launch`: any other would be ignored."""
    parser = launch_command_parser()
    known = vars(parser.parse_args(["script.py"])).keys()
    config = load_config_from_file(str(CONFIGS / name))
    assert {*config.fsdp_config, *config.deepspeed_config} <= known
    arguments, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(CONFIGS / name), "script.py"]))
    assert arguments.num_processes == EXPECTED[name][2]
    assert arguments.use_fsdp == (name == "fsdp2.yaml")
    assert arguments.use_deepspeed == (name == "deepspeed_zero2.yaml")


def test_fsdp2_saves_a_loadable_model():
    """The Trainer writes a model under FSDP only from a full state dict; version 2 is what the file's name promises."""
    config = load_config_from_file(str(CONFIGS / "fsdp2.yaml")).fsdp_config
    assert config["fsdp_version"] == 2
    assert config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


@pytest.mark.parametrize(("name", "world"), [("cpu.yaml", 1), ("cpu_two_processes.yaml", 2)])
def test_cpu_files_start_that_many_processes(name, world, tmp_path):
    script = tmp_path / "probe.py"
    script.write_text(PROBE, encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(CONFIGS / name), "--num_cpu_threads_per_process", "1", str(script), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(tmp_path.glob("rank*.json"))]
    assert reports == [{"world": [world, world], "device": "cpu", "sum": world * (world + 1) / 2}] * world
    assert "had defaults used instead" not in done.stderr  # accelerate's complaint about an incomplete configuration
