"""The Trainer's arguments, checked before anything is read: what it would find out late, with a traceback, is said in one line.

Whether an optimizer and a schedule work is asked of transformers itself, by a rehearsal on a model of one layer.
"""

import copy
import functools
import importlib.util
import inspect
import json
import os
import shutil
from contextlib import contextmanager

import torch
import transformers  # whose Trainer takes long to import
from accelerate.utils import parse_flag_from_env
from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.utils import is_liger_kernel_available

from imagedex.checkpoints import one_line
from imagedex.errors import UserError

FROM_FILES = ("accelerator_config", "fsdp_config", "deepspeed")  # a mapping or the name of a JSON file
ADAPTIVE = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)  # follow an evaluation's figure
COMPILERS = ("g++", "clang++", "c++", "cl")


def read_mappings(args: TrainingArguments) -> None:
    """Before the Trainer reads its mappings: each is one, as JSON or (some of them) as a JSON file. Raises a `ValueError`."""
    for name in args._VALID_DICT_FIELDS:
        value = getattr(args, name, None)
        if not isinstance(value, str):
            continue
        where, text = f"--{name}", value
        if not value.lstrip().startswith("{"):
            if name not in FROM_FILES:
                raise ValueError(f"--{name} {value}: give a mapping as JSON, such as '{{\"name\": 1}}'")
            where = f"--{name} {value}"
            try:
                with open(value, encoding="utf-8") as file:
                    text = file.read()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{where} cannot be read: {one_line(error)}") from None
        try:
            read = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not valid JSON ({one_line(error)})") from None
        if not isinstance(read, dict):
            raise ValueError(f"{where} must be a mapping, not {type(read).__name__}")


def check_packages(args: TrainingArguments) -> None:
    """What the Trainer asks for when it is made, and some of it even before. Raises a `ValueError`."""
    if args.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise ValueError("--deepspeed needs the package deepspeed: pip install deepspeed")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("--use_liger_kernel needs the package liger-kernel: pip install liger-kernel")


def check_trainer_arguments(args: TrainingArguments, measured: tuple[str, ...]) -> None:
    """Args: measured, the figures of an evaluation during training. Raises `UserError`."""
    check_what_works(args)
    check_helpers(args)
    if args.torch_compile:
        check_compiling(args)
    if args.do_train:
        check_best_model(args, measured)
        rehearse(args)


def check_what_works(args: TrainingArguments) -> None:
    if args.neftune_noise_alpha is not None:
        raise UserError("--neftune_noise_alpha is for language models, and no model here takes it; leave it out")
    if args.fsdp and args.world_size == 1:
        raise UserError(
            "--fsdp shards a model over several processes, and this is one; start them with "
            "accelerate launch --num_processes N, or leave it out"
        )
    sharded = bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if sharded and args.device.type == "cpu":
        raise UserError(
            "FSDP was asked for, and accelerate shards on GPUs alone: on a CPU each process would hold the whole model, as "
            "under DDP. Launch with accelerate_configs/cpu_two_processes.yaml for that, or on GPUs"
        )
    if args.debug:
        raise UserError("--debug looks into layers that models with masks do not have; leave it out")
    known = inspect.signature(torch.utils.checkpoint.checkpoint).parameters
    for name in args.activation_checkpointing_kwargs or {}:
        if name not in known or name in ("function", "args", "kwargs"):
            raise UserError(f"--activation_checkpointing_kwargs has no {name!r}; {', '.join(known)} are known to torch")


def check_helpers(args: TrainingArguments) -> None:
    """What is said of helper processes needs some."""
    if not args.dataloader_num_workers:
        for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
            if getattr(args, name):
                raise UserError(f"--{name} is for helper processes; give --dataloader_num_workers with it")


def check_compiling(args: TrainingArguments) -> None:
    from accelerate.utils import DynamoBackend

    backend = args.torch_compile_backend
    known = [name.lower() for name in DynamoBackend.__members__ if name != "NO"]
    if backend.lower() not in known:
        raise UserError(f"--torch_compile_backend {backend}: give one of {', '.join(known)}")
    try:
        torch.compile(torch.nn.Identity(), backend=backend.lower(), mode=args.torch_compile_mode)
    except Exception as error:  # torch and every backend raise their own
        raise UserError(f"--torch_compile cannot work: {one_line(error)}") from error
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else COMPILERS
    if backend == "inductor" and args.device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError("--torch_compile needs a C++ compiler on a CPU, such as g++; leave it out")


@contextmanager
def compiled(args: TrainingArguments):
    """Around what runs a model: what its compilation raises, a compiler that is not whole or a graph that cannot be made, is no
    defect of ours. Raises `UserError`."""
    try:
        yield
    except Exception as error:
        if not (args.torch_compile and isinstance(error, torch._dynamo.exc.TorchDynamoException)):
            raise
        raise UserError(f"--torch_compile does not work here: {one_line(error)}; leave it out") from error


def check_best_model(args: TrainingArguments, measured: tuple[str, ...]) -> None:
    """A best model is told by a figure that is measured."""
    metric, best = args.metric_for_best_model, args.save_strategy == SaveStrategy.BEST
    for flag, asked in (("--load_best_model_at_end", args.load_best_model_at_end), ("--save_strategy best", best)):
        if asked and args.eval_strategy == "no":
            raise UserError(f"{flag} compares evaluations, and there is none: give --eval_strategy")
    if best and not metric:
        raise UserError(f"--save_strategy best: give --metric_for_best_model, one of {', '.join(measured)}")
    if metric and metric.removeprefix("eval_") not in measured:
        raise UserError(f"--metric_for_best_model {metric} is not measured; give one of {', '.join(measured)}")


def rehearse(args: TrainingArguments) -> None:
    """A step of the optimizer and the learning rates of the schedule, as the Trainer would make them. Raises `UserError`."""
    model, args = torch.nn.Sequential(torch.nn.Linear(2, 2, device=args.device)), copy.copy(args)
    if args.optim_target_modules is not None:
        args.optim_target_modules = "all-linear"  # which layers the real model has is known later
    given = f"--optim {args.optim.value}" + (f" --optim_args {args.optim_args}" if args.optim_args else "")
    optimizer = attempt(f"{given} cannot work here", functools.partial(step_once, args, model))
    kwargs = args.lr_scheduler_kwargs
    given = f"--lr_scheduler_type {args.lr_scheduler_type.value} with --lr_scheduler_kwargs {json.dumps(kwargs or {})}"
    attempt(f"{given} cannot work", functools.partial(walk_schedule, args, optimizer, given))


def step_once(args: TrainingArguments, model) -> torch.optim.Optimizer:
    try:
        kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
    except ValueError as error:
        if "unpack" in str(error):  # of "name=value"
            raise ValueError('give "name=value", several of them with commas between') from error
        raise
    given = next((options.pop(name) for name in ("params", "model", "optimizer_dict") if name in options), None)
    optimizer = kind(model.parameters() if given is None else given, **options)
    if given is None:  # others step while gradients are computed
        with torch.enable_grad():
            model(torch.ones(1, 2, device=args.device)).sum().backward()
        optimizer.step()
    return optimizer


def walk_schedule(args: TrainingArguments, optimizer, given: str) -> None:
    """Makes the schedule, and asks it for a learning rate at its start, on its way, and at its end."""
    steps = args.max_steps if args.max_steps > 0 else 1000
    schedule = transformers.get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs
    )
    for factor in getattr(schedule, "lr_lambdas", []):
        for step in {0, 1, steps // 2, steps - 1, steps}:
            rate = factor(step) * args.learning_rate
            if not 0 <= rate < float("inf"):
                raise ValueError(f"its learning rate would be {rate:g}")


def attempt(what: str, action):
    try:
        return action()
    except Exception as error:  # the libraries raise what they like; all of it comes from the arguments
        raise UserError(f"{what}: {one_line(error)}") from error
