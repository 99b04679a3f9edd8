"""What defines a training run: one frozen dataclass, checked when it is made."""

import dataclasses
from typing import Any

from cabs_jax.loader.saved import MAX_BATCH_SIZE

DEFAULT_EXAMPLES = 100_000

# A folder or archive of images has no entry and gets the net of the paper's CIFAR-10 experiment.
DEFAULT_MODELS = {
    "digits": "digits_mlp",
    "digits_noisy": "digits_mlp",
    "mnist": "mnist_2c2d",
    "cifar10": "cifar10_2c3d",
    "cifar100": "3c3d",
    "svhn": "3c3d",
    "python": "decoder",
}
FALLBACK_MODEL = "cifar10_2c3d"

BUCKETS = "buckets"
GATED_METHODS = ("cabs_estimated", "cabs_estimated_adam", "cabs_estimated_momentum")
FIXED_SIZE_METHODS = ("constant", "constant_adam", "constant_momentum")
RISING_METHODS = ("geometric_growth", "ramp_adam", "seesaw_adam")  # sizes known beforehand
SCHEDULES = ("constant", "step", "cosine")
LARGEST_COUNT = 2**31 - 1  # of examples, which are counted in int32
LARGEST_SEED = 2**32 - 1  # JAX takes the seeds beyond for smaller ones
SMALLEST_NUMBER, LARGEST_NUMBER = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # of float32
LARGEST_MOMENTUM = 1 - 2.0**-24  # that float32 tells from 1


def option(default: Any, text: str) -> Any:
    """A dataclass field that carries the help text of its command-line option."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that a run's numbers depend on.

    Two runs with equal configurations and the same data give the same metrics, `seconds` apart.
    Where the data lies and where results go is not part of it.

    Raises:
      ValueError: A value is out of range, or two contradict each other.
    """

    dataset: str = option(
        "digits", "a folder or tar of images laid out split/class/file, a text, or a name"
    )
    method: str = option("cabs", "the rule that sets the batch size")
    model: str = option("", "by default the net that fits the data set")
    learning_rate: float = option(
        0.1,
        "the step size, and that of the rules that depend on it; noise_scale: its upper limit, "
        "of which a batch of the noise scale takes half",
    )
    schedule: str = option(
        "constant",
        "the learning rate of the methods of constant size: constant; step, to a tenth at 50 % "
        "and again at 75 % of the examples; or cosine, to 0",
    )
    momentum: float = option(0.9, "heavy-ball momentum of the methods named after it")
    weight_decay: float = option(0.0, "decoupled weight decay of the methods named after Adam")
    batch_size: int = option(16, "the size that `constant` keeps and the others start from")
    min_batch_size: int = option(16, "the smallest size an adaptive method may choose")
    max_batch_size: int = option(2048, "the largest size an adaptive method may choose")
    round_to: int | str = option(
        1,
        "round sizes to a multiple of this; 1 is the paper's exact rule. Batches are padded to "
        "one of 16 shapes and masked, so at most 16 train steps are compiled. `buckets` makes "
        "those shapes the only legal sizes: nothing is padded, but sizes are rounded to them",
    )
    lag: int = option(
        0,
        "steps until a new size takes effect; 0 is the paper's exact sequence, with 1 the next "
        "batch is loaded while the device computes",
    )
    steps: int | None = option(None, "stop after this many steps")
    examples: int | None = option(
        None, f"stop once this many examples were seen ({DEFAULT_EXAMPLES} without --steps)"
    )
    evaluations: int = option(10, "evaluations, evenly spread over the steps or examples")
    evaluation_examples: int | None = option(
        None,
        "evaluate on so many examples of either split, the same in every run (default: 2,000 of "
        "the training examples and all of the test examples)",
    )
    test_evaluations: int | None = option(
        None,
        "evaluate on the test examples, all of them, at the last so many evaluations only "
        "(default: at every one)",
    )
    averages: bool = option(
        False,
        "also average the weights, with a decay of 0.99 a step and with polynomial decay, and "
        "evaluate both averages",
    )
    record_variance: bool = option(
        False, "measure the gradient variance where the method does not need it, too"
    )
    stop_without_progress: bool = option(
        False, "end a run whose training loss is above 0.99 times its first after half of it"
    )
    seed: int = option(0, "of the initial parameters and of the order of the examples")
    width: float = option(1.0, "multiplies the channels and units of the net's hidden layers")
    theta: float = option(
        1.0, "tolerance of relative noise in the gradient: of the norm tests and of big_batch"
    )
    lipschitz: float | None = option(
        None, "expected_progress: the gradient's Lipschitz constant (default 1 / learning rate)"
    )

    def __post_init__(self) -> None:
        if self.steps is not None and self.examples is not None:
            raise ValueError("give steps or examples, not both.")
        if self.steps is None and self.examples is None:
            self._resolve("examples", DEFAULT_EXAMPLES)
        if not self.model:
            self._resolve("model", DEFAULT_MODELS.get(self.dataset, FALLBACK_MODEL))

        for name in ("learning_rate", "width", "theta", "lipschitz"):
            value = getattr(self, name)
            if value is not None and not SMALLEST_NUMBER <= value <= LARGEST_NUMBER:
                raise ValueError(
                    f"{name} must be a positive number, got {value}; float32 holds "
                    f"{SMALLEST_NUMBER:.2g} to {LARGEST_NUMBER:.2g}."
                )
        for name in (
            "batch_size",
            "min_batch_size",
            "max_batch_size",
            "steps",
            "examples",
            "evaluations",
            "evaluation_examples",
            "test_evaluations",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.examples is not None and self.examples > LARGEST_COUNT:
            raise ValueError(f"examples must be at most 2**31 - 1, got {self.examples}.")
        for name in ("batch_size", "min_batch_size", "max_batch_size"):
            if getattr(self, name) > MAX_BATCH_SIZE:
                raise ValueError(
                    f"{name} must be at most {MAX_BATCH_SIZE}, got {getattr(self, name)}."
                )
        if self.seed > LARGEST_SEED:
            raise ValueError(f"seed must be at most 2**32 - 1, got {self.seed}.")
        if not 0 < self.momentum <= LARGEST_MOMENTUM:
            raise ValueError(f"momentum must lie between 0 and 1, got {self.momentum}.")
        for name in ("seed", "lag"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not 0 <= self.weight_decay <= LARGEST_NUMBER:
            raise ValueError(
                f"weight_decay must be a number of at least 0, got {self.weight_decay}."
            )
        if self.round_to != BUCKETS and not (isinstance(self.round_to, int) and self.round_to > 0):
            raise ValueError(
                f"round_to must be a positive integer or {BUCKETS!r}, got {self.round_to!r}."
            )
        if self.min_batch_size > self.max_batch_size:
            raise ValueError(
                f"min_batch_size {self.min_batch_size} exceeds max_batch_size "
                f"{self.max_batch_size}."
            )
        self._check_schedule()
        if not self.fixed_size and not (
            self.min_batch_size <= self.batch_size <= self.max_batch_size
        ):
            raise ValueError(
                f"batch_size {self.batch_size}, where {self.method} starts, lies outside "
                f"[{self.min_batch_size}, {self.max_batch_size}]; "
                "change it, min_batch_size or max_batch_size."
            )

    def _check_schedule(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}."
            )
        scheduled = self.schedule != "constant"
        if scheduled and not self.fixed_size:
            raise ValueError(
                f"schedule {self.schedule!r} goes with {', '.join(FIXED_SIZE_METHODS)}, "
                f"not with {self.method!r}."
            )
        if self.examples is None and (scheduled or self.method in RISING_METHODS):
            what = f"schedule {self.schedule!r}" if scheduled else self.method
            raise ValueError(
                f"{what} changes at fractions of the run's examples: give examples, not steps."
            )

    @property
    def fixed_size(self) -> bool:
        """Whether every batch has `batch_size` examples."""
        return self.method in FIXED_SIZE_METHODS

    @property
    def gated(self) -> bool:
        """Whether the method asks for the loss of averaged weights."""
        return self.method in GATED_METHODS

    @property
    def limit(self) -> tuple[str, int]:
        """The column of the metrics that ends the run, `step` or `examples`, and where it ends."""
        if self.steps is not None:
            return "step", self.steps
        assert self.examples is not None
        return "examples", self.examples

    def _resolve(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the one place where a frozen field may be set
