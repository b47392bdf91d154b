"""The relay's policies on machines that are not there: a discrete-event simulation.

The policy objects are those that the relay runs; they see the same `View` and give the same `Plan`.
Only the forward is replaced, by a model of how long it takes: measured on this machine, or the
roofline of a published GPU. `docs/simulation.md` has the method, its error and its results.
"""
