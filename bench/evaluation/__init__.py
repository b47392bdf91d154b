"""The evaluation behind `python -m bench.relay`: every policy on the same requests, and its limit.

`cells` lists the measured workloads and `systems` the compared systems; `measure` runs them,
`limit` computes what the machine would allow, and `peers` and `engines` run the same requests
elsewhere. The result is one dictionary, written as JSON; `tables` and `figures` only read it.
"""
