"""Bad exports: every one a mistake that happens, each made by a few lines that can be read."""

from tests.support.mutants import (
    corruption,
    folding,
    interface,
    mode,
    precision,
    preprocessing,
    statistics,
    weights,
    wiring,
)
from tests.support.mutants.table import Mutant

FAMILIES = (
    mode.mutant,
    statistics.mutant,
    statistics.epsilon_mutant,
    statistics.momentum_mutant,
    folding.mutant,
    weights.mutant,
    precision.mutant,
    precision.quantized,
    wiring.mutant,
    wiring.activation,
    wiring.output,
    preprocessing.mutant,
    interface.batch,
    interface.mutant,
    interface.external,
    interface.hidden,
    corruption.mutant,
    corruption.opset,
    weights.runs,
)
MUTANTS = {mutant.name: mutant for family in FAMILIES for mutant in family.mutants}
assert len(MUTANTS) == sum(len(family.mutants) for family in FAMILIES), "a name twice"


def mutants_of(case: str) -> list[Mutant]:
    """The mutants that can happen to a network of `NETWORKS`."""
    return [mutant for mutant in MUTANTS.values() if case in mutant.cases]
