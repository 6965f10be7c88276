"""The library's models as models of transformers: `import titans_pytorch.hf`, and the Auto classes know them.

    import titans_pytorch.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=20)

Needs the extra `hf`: pip install 'titans-pytorch[hf]'.
"""

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
except ImportError as missing:
    raise ImportError("titans_pytorch.hf needs transformers: pip install 'titans-pytorch[hf]'") from missing

from titans_pytorch.hf.adapters import lora_targets
from titans_pytorch.hf.beside import AddedMemory
from titans_pytorch.hf.cache import TitansCache
from titans_pytorch.hf.collating import PaddingCollator
from titans_pytorch.hf.config import MACTransformerConfig, TitansModelConfig
from titans_pytorch.hf.convert import from_library, to_library
from titans_pytorch.hf.heads import MACTransformerForCausalLM, TitansForCausalLM
from titans_pytorch.hf.models import MACTransformerModel, TitansModel
from titans_pytorch.hf.tokenizer import byte_tokenizer

for config, model, causal_lm in (
    (TitansModelConfig, TitansModel, TitansForCausalLM),
    (MACTransformerConfig, MACTransformerModel, MACTransformerForCausalLM),
):
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    AutoModelForCausalLM.register(config, causal_lm)

__all__ = [
    "AddedMemory",
    "MACTransformerConfig",
    "MACTransformerForCausalLM",
    "MACTransformerModel",
    "PaddingCollator",
    "TitansCache",
    "TitansForCausalLM",
    "TitansModel",
    "TitansModelConfig",
    "byte_tokenizer",
    "from_library",
    "lora_targets",
    "to_library",
]
