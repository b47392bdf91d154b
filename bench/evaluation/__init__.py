"""The evaluation behind `python -m bench.relay`: every policy on the same requests, and its limit.

`cells` says what is run, `systems` by whom, `measure` runs it, `limit` says what the machine would
allow, `peers` and `engines` run the same requests elsewhere. What comes out is one dictionary,
written as JSON; `tables` and `figures` only read it.
"""
