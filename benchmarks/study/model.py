"""The models of the study, over dense features [B, K] and embeddings [B, F, COLUMNS]."""

from typing import Final

import torch
from torch import Tensor, nn
from torchrec.modules.crossnet import LowRankCrossNet

from benchmarks.study.tables import COLUMNS

MODELS: Final = ("DLRM", "FM", "DeepFM", "DCN")


def mlp(*sizes: int) -> list[nn.Module]:
    """Layers with ReLU between them; the last one is linear."""
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return layers[:-1]


class Model(nn.Module):
    """Logits [B] of what lies between dense features and embeddings, and a loss.

    The dense features become one more vector. DLRM has the dot products of all pairs of vectors;
    FM their sum; DeepFM adds an MLP over the vectors to it; DCN has three cross layers of rank 32
    below an MLP. The constant in the dense vector gives an FM its linear terms.
    """

    def __init__(self, kind: str, dense: int, features: int) -> None:
        super().__init__()
        self.kind = kind
        vectors = features + 1
        layers = [*mlp(dense, 32, COLUMNS), nn.ReLU()]
        self.bottom = nn.Sequential(*([nn.Linear(dense, COLUMNS)] if kind == "FM" else layers))
        self.pairs: Tensor
        one, other = torch.tril_indices(vectors, vectors, -1)
        self.register_buffer("pairs", one * vectors + other)
        if kind == "DCN":
            self.cross = LowRankCrossNet(COLUMNS * vectors, num_layers=3, low_rank=32)
        width = COLUMNS + len(self.pairs) if kind == "DLRM" else COLUMNS * vectors
        self.top = nn.Sequential(*([] if kind == "FM" else mlp(width, 64, 32, 1)))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, dense_BK: Tensor, embedded_BFD: Tensor) -> Tensor:
        vector_BD = self.bottom(dense_BK)
        vectors_BVD = torch.cat([vector_BD.unsqueeze(1), embedded_BFD], dim=1)
        logits_B: Tensor = self.bias
        if self.kind in ("FM", "DeepFM"):
            squares_BD = vectors_BVD.sum(1).square() - vectors_BVD.square().sum(1)
            logits_B = logits_B + squares_BD.sum(1) / 2
        if self.kind == "FM":
            return logits_B
        inputs_BX = vectors_BVD.flatten(1)
        if self.kind == "DLRM":
            products_BVV = torch.bmm(vectors_BVD, vectors_BVD.transpose(1, 2))
            products_BP = products_BVV.flatten(1).index_select(1, self.pairs)
            inputs_BX = torch.cat([vector_BD, products_BP], dim=1)
        elif self.kind == "DCN":
            inputs_BX = self.cross(inputs_BX)
        top_B: Tensor = self.top(inputs_BX).squeeze(1)
        return logits_B + top_B


def initial_weights(kind: str, rows: list[int]) -> Tensor:
    """float32 [all rows, COLUMNS]: TorchRec's, uniform to 1 / sqrt(rows); an FM wants less."""
    weights = torch.empty(sum(rows), COLUMNS)
    if kind == "FM":
        return weights.normal_(std=0.01)
    for part in weights.split(rows):
        part.uniform_(-(len(part) ** -0.5), len(part) ** -0.5)
    return weights
