"""Sending a trained model to the Hub: whole, and without what only this machine or its user should have."""

import shutil
from pathlib import Path

from huggingface_hub import upload_folder
from transformers.trainer_utils import HubStrategy

from imagedex.errors import UserError
from imagedex.hub import push_reason

# What only resuming needs, what names this machine's folders, and the corpus's sentences, which are not ours to publish.
PRIVATE = ["run_arguments.json", "finished.json", "training_args.bin", "trainer_state.json", "eval_queries.csv"]


def public_name(name: str) -> str:
    """A model's name on the Hub, or the last part of a folder's: where it lies on this machine is nobody's business."""
    return Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name


class PublishingMixin:
    """For a Trainer: our card, and a push to the Hub that sends model, processor, code, card and figures."""

    travelling = ("*.py",)  # what of a checkpoint a model on the Hub needs beside what Trainer sends during training

    def __init__(self, *args, write_card=None, **kwargs):
        """Args: write_card, (path, trainer) -> None, by the script that knows the run; None: no card."""
        super().__init__(*args, **kwargs)
        self.write_card = write_card

    def create_model_card(self, *args, **kwargs):
        """Our card instead of Trainer's."""
        if self.is_world_process_zero() and self.write_card is not None:
            self.write_card(Path(self.args.output_dir) / "README.md", self)

    def init_hf_repo(self, *args, **kwargs):
        """As Trainer; what the Hub refuses is the user's to mend."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  the Hub's client and its HTTP library each raise their own
            raise UserError(f"--push_to_hub: {self.args.hub_model_id} cannot be made: {push_reason(error)}") from error

    def push_to_hub(self, commit_message: str = "End of training", **kwargs):
        """One commit of the output folder, where the model is by now, without checkpoints and `PRIVATE`. Returns it on the main
        process, else None.

        Raises `UserError` when the Hub does not take it.
        """
        if not self.is_world_process_zero():
            return None
        self.create_model_card()
        self._finish_current_push()
        args, folder = self.args, Path(self.args.output_dir)
        try:
            return upload_folder(
                repo_id=self.hub_model_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=args.hub_revision,
                ignore_patterns=["_*", "checkpoint-*", ".*.tmp", *PRIVATE],
                delete_patterns=PRIVATE,  # which pushes during training have sent
            )
        except Exception as error:  # noqa: BLE001  as above
            raise UserError(
                f"the model is in {folder}, but {self.hub_model_id} did not take it: {push_reason(error)}; the same command "
                "again goes on from here"
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder):
        """As Trainer, with the model's code, without which a model on the Hub cannot be loaded."""
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            for pattern in self.travelling:
                for file in Path(checkpoint_folder).glob(pattern):
                    shutil.copy(file, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)
