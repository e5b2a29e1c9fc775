from mixmim import *
from mixmim import PRESETS, HierarchicalViT, create_mixmim
