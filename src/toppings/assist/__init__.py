"""LoRA on CPU cores while an adapter's weights travel to the device.

channel.py      shared memory between the engine and one worker: a ring of requests, rows in, results out
product.py      what is asked of a worker, and the computation itself
worker.py       the worker process
cores.py        which cores the workers get
pool.py         starts, watches and restarts the workers
coordinator.py  the decoder's `LoraContext` for a step with cold adapters
cost.py, pricing.py, plan.py   from a measured `CostProfile` to what the CPU should compute
profile.py      measures that profile
modes.py        the policies `cpu_assisted`, `cpu_shrink` and `auto`
"""
