"""Measures programs compiled for accelerators that are not there.

The data flow: a `command` asks a `worker`, a process of its own for each net and batch, to compile
the `programs` of a net for a `targets.Target`; `hlo` reads the compiled text, `kernels` says what
each of its kernels moves and computes, `costs` adds that up and models the time, and `table` shows
the sums as multiples of the plain step, or `check` compares them with a file.
"""
