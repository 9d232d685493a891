"""The two options that ask for a LoRA in the place of something else."""

from luthier.core import ConfigError, UnknownName

__all__ = ["rank_asked"]


def rank_asked(as_: str | None, rank: int | None) -> int | None:
    """The rank of the LoRA to write, by both options."""
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank}: must be 1 or more.")
    if as_ not in (None, "lora"):
        raise UnknownName(f"--as {as_}: lora is what any change of weights can be brought near to. Write --as lora.")
    if (as_ is None) != (rank is None):
        raise ConfigError("--as lora and --rank go together: --as lora --rank 16.")
    return rank
