"""Traces of requests, and a discrete-event simulator of many servers that runs the engine's own scheduler.

trace.py, readers/  requests as arrays, read from the formats of published traces
synth/              generators: arrivals, popularity, lengths, and workloads made of them
simulator.py        the event loop
instance.py         one server on virtual time; cohort.py: its jump over decode steps
runs.py             many simulations, each in a process of its own
"""
