"""Learning rate, parameter groups, optimizer, loss, and the moving average of the weights."""

import math

import pytest
import torch
from helpers import tiny_model
from transformers import TrainingArguments

from hpool_vit.toolkit.training.optimization import (
    RecipeLoss,
    WeightAverage,
    learning_rate_of,
    level_of,
    make_optimizer,
    parameter_groups,
)
from hpool_vit.toolkit.training.recipes import RecipeArguments


def group_of(groups, model, name):
    parameter = dict(model.named_parameters())[name]
    return next(group for group in groups if any(parameter is other for other in group["params"]))


def test_biases_norms_positions_and_the_class_token_are_not_decayed():
    model = tiny_model(use_class_token=True, layer_scale_init_value=0.1)
    groups = parameter_groups(model, 1e-3, 0.05)
    decayed = {name for name, _ in model.named_parameters() if group_of(groups, model, name)["weight_decay"] == 0.05}
    assert decayed == {name for name, _ in model.named_parameters() if name.endswith("weight") and "norm" not in name}


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_every_parameter_is_in_one_group(layer_decay):
    model = tiny_model()
    groups = parameter_groups(model, 1e-3, 0.05, layer_decay)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, model.parameters()))


def test_the_learning_rate_falls_from_the_head_to_the_embeddings():
    model = tiny_model()
    groups = parameter_groups(model, 1.0, 0.0, 0.5)
    rates = {
        "classifier.weight": 1.0,
        "hpool_vit.layernorm.weight": 1.0,
        "hpool_vit.layers.3.mlp.fc1.weight": 0.5,
        "hpool_vit.pooling.3.position_embeddings": 0.5,
        "hpool_vit.layers.0.mlp.fc1.weight": 0.5**4,
        "hpool_vit.embeddings.position_embeddings": 0.5**5,
    }
    assert {name: group_of(groups, model, name)["lr"] for name in rates} == rates
    # The log shows the rate of the head.
    assert groups[0]["lr"] == 1.0


def test_two_digit_blocks_have_their_own_level():
    assert level_of("hpool_vit.layers.11.mlp.fc1.bias", 13) == 12


def test_the_base_learning_rate_is_for_512_images():
    recipe = RecipeArguments(base_learning_rate=5e-4)
    assert learning_rate_of(recipe, 1.0, 1024) == pytest.approx(1e-3)
    assert learning_rate_of(RecipeArguments(), 0.3, 1024) == 0.3


def test_the_loss_without_a_teacher_is_cross_entropy_with_label_smoothing():
    logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert RecipeLoss(RecipeArguments(), 0.2)(logits, labels).item() == pytest.approx(0.9 * right + 0.1 * wrong)


def test_the_loss_takes_mixed_labels():
    logits = torch.tensor([[2.0, 0.0]])
    loss = RecipeLoss(RecipeArguments(), 0.0)
    mixed = loss(logits, torch.tensor([[0.75, 0.25]])).item()
    ends = [loss(logits, torch.tensor([label])).item() for label in (0, 1)]
    assert mixed == pytest.approx(0.75 * ends[0] + 0.25 * ends[1])


def test_soft_distillation_adds_the_divergence_from_the_teacher():
    logits, teacher, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([0])
    recipe = RecipeArguments(distillation_weight=0.25, distillation_temperature=2.0)
    p = 1 / (1 + math.exp(-1))  # the student at temperature 2
    divergence = 4 * (0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p)))
    cross_entropy = math.log(1 + math.exp(-2))
    loss = RecipeLoss(recipe, 0.0)(logits, labels, teacher).item()
    assert loss == pytest.approx(0.75 * cross_entropy + 0.25 * divergence, rel=1e-5)


def test_hard_distillation_takes_the_teachers_answer_as_the_label():
    logits, teacher, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    recipe = RecipeArguments(distillation="hard", distillation_weight=1.0)
    expected = torch.nn.functional.cross_entropy(logits, teacher.argmax(-1))
    torch.testing.assert_close(RecipeLoss(recipe, 0.1)(logits, labels, teacher), expected)


def test_a_student_that_agrees_with_its_teacher_has_no_distillation_loss():
    logits = torch.randn(4, 3)
    loss = RecipeLoss(RecipeArguments(distillation_weight=1.0), 0.0)(logits, torch.zeros(4, dtype=int), logits)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_the_average_of_the_weights_follows_them_by_the_decay():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    average = WeightAverage(model, 0.9)
    for value in (2.0, 3.0):
        torch.nn.init.constant_(model.weight, value)
        average.update()
    assert average.averages["weight"].item() == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3)


def test_the_model_has_the_averages_only_inside_the_block(pixel_values):
    model = tiny_model()
    average = WeightAverage(model, 0.5)
    before = model(pixel_values).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    after = model(pixel_values).logits
    with average.applied():
        torch.testing.assert_close(model(pixel_values).logits, before, rtol=0, atol=0)
    torch.testing.assert_close(model(pixel_values).logits, after, rtol=0, atol=0)


def test_a_saved_average_continues_where_it_was():
    models = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    first, second = (WeightAverage(model, 0.5) for model in models)
    second.load_state_dict({name: value.clone() for name, value in first.averages.items()})
    assert all(torch.equal(first.averages[name], second.averages[name]) for name in first.averages)


def test_the_optimizer_is_adamw_with_the_groups_of_the_recipe(tmp_path):
    training = TrainingArguments(str(tmp_path), weight_decay=0.3, adam_beta2=0.9, adam_epsilon=1e-5, use_cpu=True)
    optimizer = make_optimizer(tiny_model(), 0.1, RecipeArguments(layer_decay=0.5), training)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}
    assert optimizer.param_groups[0]["lr"] == 0.1 and optimizer.param_groups[-1]["lr"] == 0.1 * 0.5**5
    assert all(group["betas"] == (0.9, 0.9) and group["eps"] == 1e-5 for group in optimizer.param_groups)
