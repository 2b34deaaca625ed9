"""Questions that wait are answered together: fifty visitors who type at once cost a few passes of the model, not fifty."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor


class Together:
    """One thread that answers one after the other; what came in while it was busy is answered in one go.

    Args:
        answer: items -> for each of them its answer, or the exception that is its own.
        most: how many are answered in one go.
    """

    def __init__(self, answer: Callable[[Sequence], Sequence], most: int = 32):
        self._answer, self._most = answer, most
        self._waiting: deque = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")

    def ask(self, item) -> Future:
        """Nobody need hold a thread while it waits: the future can be awaited."""
        future: Future = Future()
        self._waiting.append((item, future))
        self._thread.submit(self._next)
        return future

    def alone(self, call: Callable, *arguments) -> Future:
        """Any call, in its turn, in the same thread."""
        return self._thread.submit(call, *arguments)

    def _next(self) -> None:
        """As many turns as questions are booked; those whose question was answered along with another find nothing to do."""
        taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._most))]
        taken = [(item, future) for item, future in taken if future.set_running_or_notify_cancel()]  # some have left
        if not taken:
            return
        answers = self._answers([item for item, _ in taken])
        for (_, future), answer in zip(taken, answers, strict=True):
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _answers(self, items: Sequence) -> Sequence:
        """What goes wrong with all is asked once more one by one: it is the fault of some, and the others have their answer."""
        try:
            return self._answer(items)
        except Exception as error:
            return [error] if len(items) == 1 else [self._answers([item])[0] for item in items]
