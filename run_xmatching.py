"""Train and evaluate XMatchingModel, the sentence-image dual encoder.

    accelerate launch run_xmatching.py recipes/quickstart/xmatching.yaml --output_dir runs/xmatching
    accelerate launch run_xmatching.py recipes/photos/xmatching.yaml \
        --dataset_name ../my_photos --text_model_name_or_path sentence-transformers/all-MiniLM-L6-v2
    python run_xmatching.py --model_name_or_path runs/xmatching --dataset_name ../my_photos --held_out_images 0.1 \
        --do_eval --output_dir runs/evaluation

A recipe comes first, flags override it. See --help for every argument, README.md for recipes and data.
"""

import logging

import imagedex.cli as cli
from imagedex.training import lifecycle, results
from imagedex.training.arguments import DataArguments, ModelArguments, XMatchingArguments, XMatchingTrainingArguments
from imagedex.training.augmentation import build_augmentation
from imagedex.training.data import (
    CaptionPairs,
    Collator,
    Pictures,
    RetrievalEvaluation,
    gallery_rows,
    keep_frozen_states,
    load_splits,
    token_rows,
    tokenize_captions,
    training_captions,
)
from imagedex.training.model_card import CardFacts, write_model_card
from imagedex.training.streaming import CaptionStream, check_streaming, first_captions, load_streamed_splits
from imagedex.training.towers import build_model, build_processor, check_towers
from imagedex.training.trainer_xmatching import XMatchingTrainer

logger = logging.getLogger(__name__)


def main(argv=None):
    groups = (ModelArguments, XMatchingArguments, DataArguments, XMatchingTrainingArguments)
    model_args, xmatching_args, data_args, args = cli.parse_arguments(groups, __doc__, argv)
    lifecycle.setup_logging(args)
    check_towers(model_args, xmatching_args)
    check_streaming(data_args, args)
    run = lifecycle.Run(args, model_args, xmatching_args, data_args)

    # corpus -> splits
    with args.main_process_first(desc="reading the corpus"):
        splits = load_streamed_splits(data_args) if data_args.streaming else load_splits(data_args)
    if splits.evaluation is None:
        lifecycle.without_evaluation(args)

    # captions -> processor -> model
    captions = first_captions(splits.train) if data_args.streaming else training_captions(splits)
    processor = build_processor(model_args, xmatching_args, data_args.image_size, captions)
    model = build_model(model_args, xmatching_args, processor)
    lifecycle.check_batches(args, model.config.loss_type, None if data_args.streaming else len(captions))

    # datasets.map -> batches
    collator = Collator(processor.tokenizer, processor.image_processor)
    texts = {"max_length": data_args.max_text_length, "num_proc": data_args.preprocessing_num_workers}
    pixels = {"keep": data_args.keep_pixels, "num_proc": data_args.preprocessing_num_workers}

    def inputs(captions, pictures, augment=None, shuffle=False):
        """Tokenised captions of a split; what the model takes for each of them; and for each picture of a split."""
        tokens = tokenize_captions(captions, processor.tokenizer, **texts)
        tokens = tokens.shuffle(seed=args.seed) if shuffle else tokens
        rows = token_rows(tokens), Pictures(pictures, processor.image_processor, augment=augment, **pixels)
        return tokens, *(keep_frozen_states(model, *rows, collator, args) if args.keep_states else rows)

    train = evaluation = None
    with args.main_process_first(desc="preprocessing"):
        if args.do_train:
            augment = build_augmentation(data_args.image_augmentation, processor.image_processor)
            if data_args.streaming:
                train = CaptionStream.of(splits.train, processor, data_args, args, augment)
            else:
                tokens, *rows = inputs(splits.train, splits.train, augment, shuffle=not args.shuffle_every_epoch)
                train = CaptionPairs(*rows, tokens["image_row"])
        if splits.evaluation is not None:
            tokens, *rows = inputs(splits.evaluation, splits.gallery)
            evaluation = RetrievalEvaluation(*rows, gallery_rows(splits.gallery, tokens["image_id"]))
            lifecycle.check_folds(args, evaluation.targets, len(splits.gallery))

    trainer = XMatchingTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=collator,
        processing_class=processor,
    )
    facts = CardFacts.of(splits, data_args)
    trainer.write_card = lambda path: write_model_card(path, "xmatching", model, args, facts)
    if (
        args.do_eval and args.compare_with_baselines and args.process_index == 0
    ):  # before training: an encoder may not fit
        facts.baselines = results.baselines(splits, args.baseline_text_encoder, xmatching_args.text_model_name_or_path)
    facts.metrics = run.carry_out(trainer)
    if args.do_train and data_args.streaming:
        train.report()
    if args.do_predict:
        results.write_predictions(trainer, splits)
    results.finish(trainer, splits, facts)


if __name__ == "__main__":
    cli.run(main)
