"""On a machine with a GPU, and perhaps no network: check the kernels and measure them.

    python3 -m bench.gpu --minutes 10            or    make gpu MINUTES=10

A GPU is at hand rarely, so nothing that a run finds stops it: a red test, a kernel that hangs, a
CUDA error that ends its process, a child that is killed. Each becomes a row or a failure, and the
rest goes on. docs/gpu.md says what to type and what the files hold. The rooms:

    __main__    the command line and the stages, one after another
    budget      how the minutes are split over the stages (pure)
    points      what is measured, in which order; a row's columns (pure)
    suspects    what hung or failed so often that it is not tried again (pure)
    forms       what is asked of the backends cuda and triton: their forms, what they launch
    crew        children that take tasks in turn, each watched; one may be lost
    timing      CUDA events around calls and graph replays, contenders in turn
    numbers     the rule by which a point's own numbers are judged
    measuring   what a child does for a point
    barrier     what it costs the programs of a grid to meet
    plugin      for pytest: a limit for each test, lost workers, what each test launched
    junit       tests.xml, and what it says of each form, cell and type
    results     the files of a run; what was measured before is not measured again
    summary     the page at the end

and the stages: ``machine`` (asked first, always), ``smoke``, ``build``, ``testing`` (core, test),
``timings`` (bench), ``sanitize``.

The parent process never touches the device: whatever does runs in a child that it can lose.
"""

import time

#: A run's minutes count from here: what torch's import takes is among them.
STARTED = time.monotonic()
