"""Programs of a launch side by side under Triton's interpreter, which runs one after another.

Each program is a thread, and one runs at a time: at every atomic operation, and before some loads
and stores, it hands on to another, drawn at random. So programs wait for one another as on a GPU,
and what a barrier does not order comes in any order.
"""

import inspect
import random
import threading

from triton.runtime import interpreter

builder = interpreter.interpreter_builder
HANDS_ON = {  # how often
    "create_atomic_rmw": 1.0,
    "create_masked_load": 0.02,
    "create_masked_store": 0.02,
}


class Launch:
    """A kernel in place of the interpreter's: its last call runs the programs of all calls."""

    def __init__(self, function, grid):
        self.function, self.programs = function, grid[0] * grid[1] * grid[2]
        self.__name__, self.__globals__ = function.__name__, function.__globals__
        self.__signature__ = inspect.signature(function)
        self.given, self.waiting, self.errors = [], {}, []
        self.random = random.Random(0)
        self.ended = threading.Semaphore(0)

    def __call__(self, **arguments):
        self.given.append((builder.grid_idx, arguments))
        if len(self.given) < self.programs:
            return
        threads = [threading.Thread(target=self.run, args=given) for given in self.given]
        for thread in threads:
            self.waiting[thread] = threading.Semaphore(0)
        for thread in threads:
            thread.start()
        hand_on.launch = self
        try:
            self.wake()
            self.ended.acquire()
        finally:
            hand_on.launch = None
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def run(self, index, arguments):
        me = threading.current_thread()
        mine = self.waiting[me]
        mine.acquire()
        builder.grid_idx = index
        try:
            self.function(**arguments)
        except BaseException as error:
            self.errors.append(error)
        del self.waiting[me]
        self.wake()

    def wake(self):
        if self.waiting:
            self.random.choice(list(self.waiting.values())).release()
        else:
            self.ended.release()

    def hand_on(self):
        index, mine = builder.grid_idx, self.waiting[threading.current_thread()]
        self.wake()
        mine.acquire()
        builder.grid_idx = index


def hand_on(share):
    launch = hand_on.launch
    if launch is not None and launch.random.random() < share:
        launch.hand_on()


hand_on.launch = None


def together(monkeypatch):
    """Until the test ends, the programs of a launch run side by side."""

    class Executor(interpreter.GridExecutor):
        def __init__(self, fn, arg_names, grid, *rest):
            super().__init__(fn, arg_names, grid, *rest)
            grid = tuple(grid) + (1,) * (3 - len(grid))
            if grid[0] * grid[1] * grid[2] > 1:
                self.fn = Launch(fn, grid)

    def first_hand_on(operation, share):
        def run(*arguments):
            hand_on(share)
            return operation(*arguments)

        return run

    monkeypatch.setattr(interpreter, "GridExecutor", Executor)
    for name, share in HANDS_ON.items():
        operation = first_hand_on(getattr(builder, name), share)
        monkeypatch.setattr(builder, name, operation, raising=True)
