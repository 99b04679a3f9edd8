"""Measures: every benchmark has options of its own."""

from cyclopts import App

from experiments import benchmarks
from experiments.commands import add_modules

main = App(name="bench")
add_modules(main, benchmarks)
