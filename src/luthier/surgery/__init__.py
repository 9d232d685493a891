"""The one operation: carry out a method's edits on a model, and undo, switch, merge, save and load them.

Everything that is not a paper's idea is here once: freezing, fused and transposed layers, precision, stacking.
"""

from luthier.surgery.answers import answered, answerers
from luthier.surgery.attachment import Attachment
from luthier.surgery.base import Base
from luthier.surgery.branch import BlockCall
from luthier.surgery.compose import Combined, method
from luthier.surgery.context import Context
from luthier.surgery.edits import (
    AddBranch,
    Attach,
    Attend,
    Edit,
    Linearise,
    LookFirst,
    PrependKeys,
    PrependTokens,
    Reparametrise,
    Unfreeze,
    attach_each,
    layer_of,
)
from luthier.surgery.first_order import move, value_of
from luthier.surgery.loading import load
from luthier.surgery.look import Look, OneRow, gradients, passes_of, rows_of
from luthier.surgery.method import METHODS, Batches, Group, Method, Mixing, Objective, PerSite
from luthier.surgery.peft_files import from_peft, to_peft
from luthier.surgery.peft_forms import PEFT_LAYERS, PeftForm, PeftIn, PeftOut, PeftTaken, PeftWhole
from luthier.surgery.phase import Phase
from luthier.surgery.phases import Phases
from luthier.surgery.shapes import matrices, numbers, reserved_positions
from luthier.surgery.source import Source
from luthier.surgery.sources import open_source
from luthier.surgery.storage import decode_layers, encode_layers
from luthier.surgery.training_state import is_head
from luthier.surgery.tuned import Tuned, attach
from luthier.surgery.tuning import keyed
from luthier.surgery.tuning_files import read_tuning
from luthier.surgery.view import TunedView, TuningView

__all__ = [
    "METHODS",
    "PEFT_LAYERS",
    "AddBranch",
    "Attach",
    "Attachment",
    "Attend",
    "Base",
    "Batches",
    "BlockCall",
    "Combined",
    "Context",
    "Edit",
    "Group",
    "Linearise",
    "Look",
    "LookFirst",
    "Method",
    "Mixing",
    "Objective",
    "OneRow",
    "PeftForm",
    "PeftIn",
    "PeftOut",
    "PeftTaken",
    "PeftWhole",
    "PerSite",
    "Phase",
    "Phases",
    "PrependKeys",
    "PrependTokens",
    "Reparametrise",
    "Source",
    "Tuned",
    "TunedView",
    "TuningView",
    "Unfreeze",
    "answered",
    "answerers",
    "attach",
    "attach_each",
    "decode_layers",
    "encode_layers",
    "from_peft",
    "gradients",
    "is_head",
    "keyed",
    "layer_of",
    "load",
    "matrices",
    "method",
    "move",
    "numbers",
    "open_source",
    "passes_of",
    "read_tuning",
    "reserved_positions",
    "rows_of",
    "to_peft",
    "value_of",
]
