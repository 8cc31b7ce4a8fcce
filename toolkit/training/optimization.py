"""What changes the weights: learning rate, parameter groups, optimizer, the loss with distillation, their average."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainingArguments

from hpool_vit import HPoolViTForImageClassification

from .recipes import RecipeArguments


def learning_rate_of(recipe: RecipeArguments, learning_rate: float, images_per_step: int) -> float:
    """The peak learning rate: `base_learning_rate` × images per step / 512, as in DeiT, or `learning_rate`."""
    if recipe.base_learning_rate is None:
        return learning_rate
    return recipe.base_learning_rate * images_per_step / 512


def make_optimizer(
    model: HPoolViTForImageClassification,
    learning_rate: float,
    recipe: RecipeArguments,
    training: TrainingArguments,
) -> torch.optim.Optimizer:
    """AdamW on the parameter groups of the recipe."""
    groups = parameter_groups(model, learning_rate, training.weight_decay, recipe.layer_decay)
    betas = (training.adam_beta1, training.adam_beta2)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=training.adam_epsilon)


def parameter_groups(
    model: HPoolViTForImageClassification, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """
    Groups for an optimizer: no weight decay on biases, norms, position embeddings and the class token, and a learning
    rate that falls by the factor `layer_decay` per block, from the head down to the embeddings.
    """
    exempt = model.no_weight_decay()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    depth = model.config.num_hidden_layers + 1
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        level, decays = level_of(name, depth), parameter.ndim > 1 and name not in exempt
        group = groups.setdefault(
            (level, decays),
            {
                "params": [],
                "lr": learning_rate * layer_decay ** (depth - level),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    if layer_decay == 1.0:
        merged = [[g for (_, decays), g in groups.items() if decays is kind] for kind in (True, False)]
        return [{**part[0], "params": [p for g in part for p in g["params"]]} for part in merged if part]
    # The head comes first: its rate is the one that is logged.
    return [groups[key] for key in sorted(groups, reverse=True)]


def level_of(name: str, depth: int) -> int:
    """The level of a parameter: 0 in the embeddings, i + 1 in block i and its pooling, `depth` in the rest."""
    if match := re.search(r"\.(?:layers|pooling)\.(\d+)\.", name):
        return int(match.group(1)) + 1
    return 0 if ".embeddings." in name else depth


class RecipeLoss:
    """
    Cross-entropy with label smoothing and, with a teacher, distillation (DeiT, arXiv 2012.12877, Equations 2 and 3).

    Call it with logits of shape (batch_size, num_labels), labels of shape (batch_size,) or, after mixing, shares of
    shape (batch_size, num_labels), and the teacher's logits or None. It returns the mean over the batch.
    """

    def __init__(self, recipe: RecipeArguments, label_smoothing: float):
        self.recipe, self.label_smoothing = recipe, label_smoothing

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, teacher_logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        logits = logits.float()
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if teacher_logits is None:
            return loss
        weight = self.recipe.distillation_weight
        return (1 - weight) * loss + weight * self.distillation(logits, teacher_logits.float())

    def distillation(self, logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        if self.recipe.distillation == "hard":
            return nn.functional.cross_entropy(logits, teacher_logits.argmax(-1))
        temperature = self.recipe.distillation_temperature
        student, teacher = (
            nn.functional.log_softmax(scores / temperature, dim=-1) for scores in (logits, teacher_logits)
        )
        # The factor T² keeps the size of the gradient (Hinton et al., arXiv 1503.02531).
        return temperature**2 * nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


class WeightAverage:
    """
    Exponential moving average of a model's weights, sharded as the weights are.

    Args:
        model: the model to average; those of its parameters that train are the first average.
        decay: the share of the average that each step keeps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.update_averages = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self):
        """Call this after every step of the optimizer."""
        self.update_averages(list(self.averages.values()), list(self.parameters.values()), None)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model has the averages as its weights; after it, its own again."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._copy(self.averages)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, source: dict[str, torch.Tensor]):
        for module in self.model.modules():
            # FSDP2 may still hold gathered weights, which would hide the values copied into the shards.
            if isinstance(module, FSDPModule):
                module.reshard()
        for name, parameter in self.parameters.items():
            parameter.copy_(source[name])

    def load_state_dict(self, state: dict[str, torch.Tensor]):
        """Reads the averages from whole tensors under the model's names, as in a saved folder."""
        for name, average in self.averages.items():
            value = state[name].to(average.device, average.dtype)
            if isinstance(average, DTensor):
                value = distribute_tensor(value, average.device_mesh, average.placements)
            average.copy_(value)
