"""`pointsman bench cpu`: this engine beside other CPU engines, on one machine, in one run.

Every contender runs in a process of its own, started anew in every round, and rounds go through all of them in turn, so that whatever
else the machine does meets them alike. `workers` is what runs in those processes, `run` what starts them and says what was found.
"""
