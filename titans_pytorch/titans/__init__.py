"""The models of the paper: the memory as context, as gate, as layer, and by itself."""

from titans_pytorch.titans.backbone import TitansBackbone
from titans_pytorch.titans.config import TitansConfig
from titans_pytorch.titans.language_model import TitansLMM, TitansMAC, TitansMAG, TitansMAL
from titans_pytorch.titans.state import TitansState

__all__ = ["TitansBackbone", "TitansConfig", "TitansLMM", "TitansMAC", "TitansMAG", "TitansMAL", "TitansState"]
