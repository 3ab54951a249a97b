"""What measures: it plays workloads over HTTP, into an engine or the simulator, sums up and draws.

The verbs `bench`, `report`, `simulate`, `trace`, `reproduce` and `profile batches` live here, and what the
scripts in benchmarks/ share. Serving imports none of it; it imports whatever it measures.

workload.py, outcome.py  what is sent, and what became of each request
players/                 a trace over HTTP, into an engine, into the simulator: one way to ask for it
summary.py, figures.py   latencies in a few numbers, and drawn
options.py               a verb's options, made from dataclasses; script.py: those of a script
results.py, machine.py   what is written, and where it was measured
http/                    a server from outside: client, load, `toppings serve` as a subprocess
modes/                   loading modes compared; what servers' step logs say
batches/                 timed steps of an engine in this process, and models fitted to them
simulation/              simulated fleets: summaries, the verbs `simulate` and `trace`
validation/              the engine against its simulation
reproduce/               published figures again, one verb each
cpu/                     the machine by itself: LoRA on cores, rows between processes
"""
