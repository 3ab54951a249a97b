"""Handing rows to several processes: shared memory against UNIX and TCP sockets (toppings.lab.cpu.ipc).

    python benchmarks/ipc.py                       # 1, 3 and 5 receivers; 64 and 256 rows of 4096 bf16
    python benchmarks/ipc.py --toy                 # small and short: does the script still work?
    python benchmarks/ipc.py --json ipc.json --figure ipc.png

Ends in one JSON line, whose `floor_us` is the time of one plain copy of the payload within this process.
"""

import os

from toppings.lab.cpu import ipc
from toppings.lab.figures import new_figure, save
from toppings.lab.script import finish, make_parser, parse


def main() -> None:
    options = parse(make_parser(__doc__, "small and short", figure="bars"))
    rows, receivers, num_rounds = ([2], [1, 2], 3) if options.toy else ([64, 256], [1, 3, 5], 200)
    num_repeats = 1 if options.toy else 3
    times, floors = ipc.run(rows, receivers, num_rounds, num_repeats=num_repeats, on_line=print)
    if options.figure:
        figure, axes = new_figure(1, width=7)
        ipc.draw(axes[0, 0], times)
        save(figure, options.figure)
    finish(options, "ipc", num_cores=os.cpu_count(), us=times, floor_us=floors)


if __name__ == "__main__":
    main()
