"""Parameter-efficient fine-tuning: which part of a pre-trained module is trained, and therefore sent.

``METHODS[name](trunk, **options)`` takes a pre-trained torch module and returns one in which exactly the chosen part
has ``requires_grad``. `Tuned` keeps the rest in evaluation mode; a learner communicates what is trained, and nothing
else.
"""

from collections.abc import Callable, Mapping

from torch import nn

from fedray.peft.added import adapter, prompt
from fedray.peft.counting import Count, count, paper_cost_mib, table
from fedray.peft.library import ia3, lora, soft_prompt
from fedray.peft.methods import bias, coop, full, head, last_blocks, layernorm
from fedray.peft.parts import Method, Tuned, blocks_of

__all__ = ["METHODS", "Count", "Method", "Tuned", "blocks_of", "count", "paper_cost_mib", "table"]

METHODS: Mapping[str, Callable[..., nn.Module]] = {
    "full": full,
    "head": head,
    "bias": bias,
    "layernorm": layernorm,
    "prompt": prompt,
    "adapter": adapter,
    "lora": lora,
    "ia3": ia3,
    "last_blocks": last_blocks,
    "coop": coop,
    "soft_prompt": soft_prompt,
}
