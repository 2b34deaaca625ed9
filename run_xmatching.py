r"""Train and evaluate XMatchingModel, the sentence-image dual encoder.

    python run_xmatching.py recipes/quickstart/xmatching.yaml --output_dir runs/xmatching
    python run_xmatching.py recipes/photos/xmatching.yaml --dataset_name my_photos --output_dir runs/photos
    python run_xmatching.py recipes/photos/xmatching.yaml --train_file pairs.csv --image_dir pictures --output_dir runs/pairs
    python run_xmatching.py --model_name_or_path runs/photos --dataset_name my_photos --held_out_captions_per_image 1 \
        --do_eval --output_dir runs/evaluation

A recipe comes first: a file, or the name of one that comes with imagedex (`imagedex recipes` lists them). Flags override it. A
flag also removes the recipe's alternatives to it: --train_file removes dataset_name.
"""

import functools

from imagedex import endings

if __name__ == "__main__":
    endings.leave_at_ctrl_c()  # the imports that follow take seconds

from imagedex import command_line
from imagedex.corpora.arguments import DataArguments
from imagedex.training.arguments import ModelArguments
from imagedex.training.dual_encoder.arguments import XMatchingArguments, XMatchingTrainingArguments

ARGUMENTS = (ModelArguments, XMatchingArguments, DataArguments, XMatchingTrainingArguments)


def main(argv=None, prog=None):
    model_args, xmatching_args, data_args, args = command_line.parse_arguments(ARGUMENTS, __doc__, argv, prog)

    # what takes seconds to import comes after the arguments are known: --help and a mistake answer at once
    from imagedex.corpora import load_splits, training_captions
    from imagedex.training import logs, results, run
    from imagedex.training.cards import CardFacts, write_xmatching_card
    from imagedex.training.dual_encoder.data import DualEncoderRows
    from imagedex.training.dual_encoder.streaming import check_streaming, first_captions, load_streamed_splits
    from imagedex.training.dual_encoder.trainer import XMatchingTrainer
    from imagedex.training.processors import build_processor
    from imagedex.training.towers import build_model, check_towers

    logs.setup_logging(args)
    data_args.require_corpus()
    check_towers(model_args, xmatching_args, data_args.image_size)
    check_streaming(data_args, args)
    life = run.Run(args, model_args, xmatching_args, data_args)
    if life.finished:
        return results.say_again(life)
    results.check_compared(args.compare_with_model)

    # corpus -> splits
    with args.main_process_first(desc="reading the corpus"):
        splits = load_streamed_splits(data_args) if data_args.streaming else load_splits(data_args)
    if splits.evaluation is None:
        run.without_evaluation(args)

    # captions -> processor -> model
    captions = first_captions(splits.train) if data_args.streaming else training_captions(splits)
    whole = "model_name_or_path", model_args.model_name_or_path
    text_tower, style = xmatching_args.text_model_name_or_path, {"max_text_length": data_args.max_text_length}
    processor = build_processor(model_args, whole, text_tower, data_args.image_size, captions, style)
    model = build_model(model_args, xmatching_args, processor, life.checkpoint)
    run.check_batches(args, model.config.loss_type, None if data_args.streaming else len(captions))

    # datasets.map -> batches
    rows = DualEncoderRows(splits, model, processor, data_args, args)
    with args.main_process_first(desc="preprocessing"):
        train = rows.training() if args.do_train else None
        evaluation = rows.evaluation() if splits.evaluation is not None else None
    rows.keep_states(train, evaluation)

    # before anything is written: an encoder may not fit
    facts = CardFacts.of(splits, data_args)
    facts.baselines = results.measure_baselines(life, splits, text_tower, args.compare_with_model)
    trainer = XMatchingTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=rows.collator,
        processing_class=processor,
        head_start=rows.start_heads(train, life.checkpoint, life.trained),
        write_card=functools.partial(write_xmatching_card, facts=facts),
    )
    facts.metrics = life.carry_out(trainer)
    if args.do_predict and not life.has("rankings.jsonl"):
        results.write_predictions(trainer, splits)
    results.finish(life, trainer, splits, facts)


if __name__ == "__main__":
    command_line.run(main)
