"""What more GPUs would give, from the times of parts that were measured: a step's time by layout, and requests served in such steps.

`parts` reads the measurements, `layouts` says what a step costs on which GPUs, `serving` runs the scheduler of the engine in simulated
time. Nothing is fitted to the figures that it is compared with.
"""
