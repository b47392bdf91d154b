"""The relay's policies on machines that we do not have: a discrete-event simulation.

The policy objects are the relay's; they receive the same `View` and return the same `Plan`. Only
the forward is replaced by a model of its duration: measured on this machine, or the roofline of a
published GPU. `docs/simulation.md` describes the method, its error and its results.
"""
