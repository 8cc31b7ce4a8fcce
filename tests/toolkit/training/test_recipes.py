"""Recipes and their augmentation."""

import re

import pytest
import torch
from helpers import tiny_model
from PIL import Image

from hpool_vit import HPoolViTImageProcessor
from hpool_vit.toolkit.training.recipes import (
    RECIPES,
    RecipeArguments,
    batch_mixing,
    recipe_arguments,
    train_transform,
    validation_transform,
)


@pytest.fixture
def image_processor():
    return HPoolViTImageProcessor.for_config(tiny_model().config)


@pytest.fixture
def photo():
    return Image.effect_noise((48, 40), 60).convert("RGB")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_gives_normalized_images_of_the_models_size(name, image_processor, photo):
    pixel_values = train_transform(recipe_arguments(name), image_processor)(photo)
    assert pixel_values.shape == (3, 32, 32) and pixel_values.dtype == torch.float32
    assert pixel_values.min() < 0 < pixel_values.max()


@pytest.mark.parametrize(
    "change",
    [
        {"rand_augment_ops": 2},
        {"affine_degrees": 20},
        {"affine_translate": 0.2},
        {"affine_scale": 0.3},
        {"random_erasing": 1.0},
        {"horizontal_flip": 1.0},
        {"train_crop": "padded"},
        {"train_crop": "random_resized"},
    ],
    ids=lambda change: next(iter(change)) + str(next(iter(change.values()))),
)
def test_each_augmentation_changes_the_image(change, image_processor, photo):
    plain = {"train_crop": "none", "horizontal_flip": 0.0}
    without = train_transform(RecipeArguments(**plain), image_processor)(photo)
    differences = 0
    for seed in range(3):
        torch.manual_seed(seed)
        augmented = train_transform(RecipeArguments(**{**plain, **change}), image_processor)(photo)
        differences += not torch.equal(augmented, without)
    assert differences >= 2


def test_training_without_augmentation_sees_what_the_evaluation_sees():
    processor = HPoolViTImageProcessor.for_config(tiny_model().config, size={"shortest_edge": 32})
    photo = Image.effect_noise((32, 32), 60).convert("RGB")
    plain = RecipeArguments(train_crop="none", horizontal_flip=0.0)
    torch.testing.assert_close(train_transform(plain, processor)(photo), validation_transform(processor)(photo))


def test_an_image_processor_without_a_crop_is_trained_at_its_own_size(photo):
    plain = RecipeArguments(train_crop="none", horizontal_flip=0.0)
    processor = HPoolViTImageProcessor(do_center_crop=False, size={"height": 32, "width": 48})
    assert train_transform(plain, processor)(photo).shape == (3, 32, 48)
    difference = (train_transform(plain, processor)(photo) - validation_transform(processor)(photo)).abs()
    assert difference.max() < 0.02  # one of 255 levels: Pillow rounds otherwise
    with pytest.raises(ValueError, match=r"`size=.*without a center crop.*set `do_center_crop` to true"):
        train_transform(plain, HPoolViTImageProcessor(do_center_crop=False, size={"shortest_edge": 32}))


def test_mixing_turns_labels_into_shares_of_the_classes():
    assert batch_mixing(RecipeArguments(), 3) is None
    for settings in ({"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}):
        mix = batch_mixing(RecipeArguments(**settings), 3)
        pixel_values, labels = mix(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))
        assert pixel_values.shape == (4, 3, 8, 8)
        torch.testing.assert_close(labels.sum(1), torch.ones(4))
        assert ((labels > 0).sum(1) == 2).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_crop", "square"),
        ("distillation", "warm"),
        ("horizontal_flip", 1.5),
        ("random_erasing", -0.1),
        ("layer_decay", 0.0),
        ("crop_min_scale", 2.0),
        ("eval_crop_ratio", 0.0),
        ("mixup_alpha", -1.0),
        ("ema_decay", 1.0),
        ("repeated_augmentation", 0),
        ("distillation_temperature", 0.0),
        ("distillation_weight", 2.0),
    ],
)
def test_a_value_that_no_recipe_can_have_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=re.escape(f"`{name}={value!r}`")):
        RecipeArguments(**{name: value})


def test_a_named_recipe_sets_its_own_augmentation_and_leaves_the_rest():
    recipe = recipe_arguments("finetune")
    assert (recipe.recipe, recipe.layer_decay, recipe.crop_min_scale, recipe.mixup_alpha) == (
        "finetune",
        0.75,
        0.35,
        0,
    )
    with pytest.raises(ValueError, match=r"`recipe='deitt'` is unknown: choose deit, finetune, tiny, linear-probe"):
        recipe_arguments("deitt")
