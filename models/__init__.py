"""`models.load(path_or_id)` gives a trained model; `models.build(name, ...)` a fresh one."""

from models.base_model import BaseModel, ModelError
from models.load import load
from models.model import MODELS, build

__all__ = ["MODELS", "BaseModel", "ModelError", "build", "load"]
