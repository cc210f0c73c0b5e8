"""A callback for transformers' Trainer that prints what patch did, and afterwards which backends ran."""

from transformers.trainer_callback import TrainerCallback


class ReportCallback(TrainerCallback):
    """Prints a patch report when training begins, and again, now with the calls per backend, when it ends.

    >>> Trainer(model, ..., callbacks=[ReportCallback(fastattn.patch(model))])
    """

    def __init__(self, report):
        self.report = report

    def on_train_begin(self, args, state, control, **kwargs):
        self._print(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._print(state)

    def _print(self, state):
        if state.is_world_process_zero:
            print(self.report)
