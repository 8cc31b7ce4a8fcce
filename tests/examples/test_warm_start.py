"""The measurements of warm starts: their rival ToMe, what they compare, and the tables that are published."""

import json
import shutil

import pytest
import torch
import warm_start_report
from datasets import ClassLabel, Dataset, Features, Image
from helpers import ROOT, tiny_model
from PIL import Image as PILImage
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from warm_start_fine_tune import faster_variants, with_merging
from warm_start_fine_tune import main as fine_tune
from warm_start_training_free import (
    EUCLIDEAN,
    IMAGENET_CLASSES,
    MERGES,
    RULES,
    ToMe,
    compare,
    compared_by,
    merge_config,
    merge_most_similar,
)
from warm_start_training_free import main as training_free

from hpool_vit.toolkit.shared.measuring import Logits


RESULTS = ROOT / "docs" / "results"
FASTER = [*(f"then {name}" for name in MERGES), "then ToMe r = 12", "then ToMe r = 16"]


def merge_one_by_one(tokens: torch.Tensor, sizes: torch.Tensor, metric: torch.Tensor, num_merged: int):
    """ToMe's matching for one image, with loops, as Section 3 of its paper describes it in words."""
    sources, targets = range(0, len(tokens), 2), range(1, len(tokens), 2)
    edges = []
    for source in sources:
        if source == 0:  # the class token
            continue
        similarity, target = max(
            (torch.cosine_similarity(metric[source], metric[target], dim=0).item(), target) for target in targets
        )
        edges.append((similarity, source, target))
    groups = {token: [token] for token in range(len(tokens))}
    for _, source, target in sorted(edges, reverse=True)[:num_merged]:
        groups[target] += groups.pop(source)
    kept = [token for token in (*sources, *targets) if token in groups]
    size = [sum(sizes[member].item() for member in groups[token]) for token in kept]
    sums = [sum(sizes[member] * tokens[member] for member in groups[token]) for token in kept]
    return torch.stack([total / count for total, count in zip(sums, size, strict=True)]), torch.tensor(size)


@pytest.mark.parametrize("num_tokens", [17, 16, 3])
@pytest.mark.parametrize("num_merged", [0, 1, 5, 7, 50])
def test_tome_merges_the_pairs_that_loops_over_its_definition_merge(num_tokens, num_merged):
    hidden_states, metric = torch.randn(3, num_tokens, 8).double(), torch.randn(3, num_tokens, 4).double()
    sizes = torch.randint(1, 5, (3, num_tokens, 1)).double()
    merged, merged_sizes = merge_most_similar(hidden_states, sizes, metric, num_merged)
    for image in range(3):
        expected, expected_sizes = merge_one_by_one(hidden_states[image], sizes[image], metric[image], num_merged)
        # Without a merge, the tokens stay in place.
        order = slice(None) if len(expected) < num_tokens else [*range(0, num_tokens, 2), *range(1, num_tokens, 2)]
        torch.testing.assert_close(merged[image][order], expected)
        torch.testing.assert_close(merged_sizes[image, :, 0][order], expected_sizes.double())


def test_tome_protects_the_class_token_and_merges_at_most_half_of_the_others():
    tokens = torch.randn(2, 17, 8)
    # The class token is the one most like another, and would be merged first.
    tokens[:, 1] = tokens[:, 0]
    merged, sizes = merge_most_similar(tokens, torch.ones(2, 17, 1), tokens, num_merged=50)
    assert merged.shape == (2, 9, 8)
    torch.testing.assert_close(merged[:, 0], tokens[:, 0])
    assert (sizes[:, 0] == 1).all() and (sizes.sum(1) == 17).all()


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return tiny_model(hvt_pool=None, use_class_token=True, ln_order="pre", layer_scale_init_value=0.5)


def test_tome_that_merges_nothing_gives_the_logits_of_the_model(vit, pixel_values):
    with torch.no_grad():
        torch.testing.assert_close(ToMe(vit, 0)(pixel_values), vit(pixel_values).logits)
        assert not torch.allclose(ToMe(vit, 8)(pixel_values), vit(pixel_values).logits)


def test_tome_merges_in_every_block_between_attention_and_mlp(vit, pixel_values):
    tokens = {"attention": [], "mlp": []}
    hooks = [
        getattr(layer, name).register_forward_pre_hook(
            lambda _, args, name=name: tokens[name].append(args[0].shape[1])
        )
        for layer in vit.hpool_vit.layers
        for name in ("mlp",)
    ]
    hooks += [
        layer.attention.k_proj.register_forward_pre_hook(lambda _, args: tokens["attention"].append(args[0].shape[1]))
        for layer in vit.hpool_vit.layers
    ]
    with torch.no_grad():
        ToMe(vit, 8)(pixel_values)
    for hook in hooks:
        hook.remove()
    assert tokens == {"attention": [65, 57, 49, 41], "mlp": [57, 49, 41, 33]}


def test_tome_attends_to_a_merged_token_as_to_its_patches_one_by_one(vit):
    attention = vit.hpool_vit.layers[0].attention
    tokens = torch.randn(2, 5, 32)
    sizes = torch.tensor([1.0, 3, 1, 2, 1]).reshape(1, 5, 1).expand(2, -1, -1)
    repeats = torch.tensor([0, 1, 1, 1, 2, 3, 3, 4])
    with torch.no_grad():
        output, metric = ToMe.attend(attention, tokens, sizes)
        one_by_one, _ = ToMe.attend(attention, tokens[:, repeats], torch.ones(2, 8, 1))
        keys = attention.k_proj(tokens).unflatten(-1, (2, 16))
    torch.testing.assert_close(output, one_by_one[:, [0, 1, 4, 5, 7]])
    torch.testing.assert_close(metric, keys.mean(2))


def test_a_schedule_of_merges_removes_the_number_of_tokens_that_its_name_says():
    for config in MERGES.values():
        fields = {"image_size": 224, "patch_size": 16, "num_hidden_layers": 12, **config}
        assert tiny_model(**fields).config.tokens_per_stage() == [196, 159, 122, 85, 48]


def test_merging_takes_over_the_weights_of_an_unpooled_model(vit, pixel_values):
    merging = with_merging(vit, merge_config([1, 3], 8, num_patches=64))
    assert merging.config.tokens_per_stage() == [64, 56, 48]
    for name, weight in vit.state_dict().items():
        assert torch.equal(merging.state_dict()[name], weight), name
    assert merging(pixel_values).logits.shape == (2, 3)


def test_a_trained_model_is_sped_up_by_merging_and_by_tome_with_its_own_weights():
    sizes = {"image_size": 56, "num_hidden_layers": 12, "hidden_size": 16, "intermediate_size": 16}
    model = tiny_model(hvt_pool=None, use_class_token=True, ln_order="pre", **sizes)
    images = torch.randn(2, 3, 56, 56)
    variants = faster_variants(model)
    assert list(variants) == FASTER
    with torch.no_grad():
        logits = {name: variant(images) for name, variant in variants.items()}
        logits["unpooled"] = Logits(model)(images)
        assert torch.equal(logits["unpooled"], model(images).logits)
    assert all(answer.shape == (2, 3) for answer in logits.values())
    assert len({tuple(answer.flatten().tolist()) for answer in logits.values()}) == 5


def test_a_rule_changes_what_merging_compares_only_while_it_is_in_use(pixel_values):
    model = tiny_model(use_class_token=True, ln_order="pre", **merge_config([1, 3], 8, num_patches=64))
    answers = {}
    with torch.no_grad():
        own = model(pixel_values).logits
        for rule in RULES:
            with compared_by(rule, model):
                answers[rule] = model(pixel_values).logits
        assert torch.equal(model(pixel_values).logits, own)
    assert torch.equal(answers[EUCLIDEAN], own)
    cosines = [answers[rule] for rule in RULES if rule != EUCLIDEAN]
    assert not torch.equal(cosines[0], own) and not torch.equal(*cosines)


def test_answers_are_compared_by_accuracy_divergence_and_agreement():
    reference = torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    labels = torch.tensor([1, 0, 0, 0])
    same = compare(reference, reference, labels)
    assert same == {"accuracy": 75, "divergence": pytest.approx(0, abs=1e-6), "agreement": 100}
    other = compare(reference.flip(1), reference, labels)
    probabilities = reference.softmax(-1)
    divergence = (probabilities * (probabilities / probabilities.flip(1)).log()).sum(-1).mean().item()
    assert other == {"accuracy": 25, "divergence": pytest.approx(divergence), "agreement": 0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Parquet files of ants and bees, as the programs read them."""
    folder = tmp_path_factory.mktemp("photos")
    features = Features({"image": Image(), "label": ClassLabel(names=list(IMAGENET_CLASSES))})
    pixels = torch.randint(0, 256, (4, 24, 32, 3), dtype=torch.uint8).numpy()
    for split in ("train", "test"):
        rows = {"image": [PILImage.fromarray(image) for image in pixels], "label": [0, 1, 0, 1]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000.parquet")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A ViT of twelve narrow blocks with as many patches and classes as the measured one."""
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_labels": 1000}
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_the_measurements_end_in_tables_and_plots(photos, weights, tmp_path, capsys):
    flags = ["--weights", weights, "--data_dir", str(photos), "--output_dir", str(tmp_path)]
    flags += ["--batch_size", "4", "--rounds", "1", "--num_threads", str(torch.get_num_threads())]
    training_free(["settings", *flags])
    training_free(["rules", *flags])
    models = ["unpooled, class token", "max at 1, 5, 9, pooled positions"]
    run = [*flags, "--epochs", "1", "--seeds", "0", "--train_batch_size", "2", "--models", *models]
    fine_tune(run)
    finished = (tmp_path / "warm_start_fine_tune.json").read_bytes()
    fine_tune(run)  # has nothing left to do
    assert (tmp_path / "warm_start_fine_tune.json").read_bytes() == finished
    with pytest.raises(SystemExit, match="holds runs of 1 epochs"):
        fine_tune([*run, "--epochs", "2"])

    capsys.readouterr()
    warm_start_report.main([str(tmp_path)])
    printed = capsys.readouterr().out
    for row in (
        "| ToMe r = 16 | 0.0",
        "| merge 37 at 1, 3, 5, 7 | cosine of hidden states |",
        f"| {models[1]} | 1e-04",
    ):
        assert row in printed, printed
    (unpooled,) = [run for run in json.loads(finished)["runs"] if run["name"] == models[0]]
    assert list(unpooled["faster"]) == FASTER
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_the_published_tables_show_the_published_numbers(tmp_path, capsys):
    for file in RESULTS.glob("warm_start_*.json"):
        shutil.copy(file, tmp_path)
    warm_start_report.main([str(tmp_path)])
    page = (RESULTS / "warm_start.md").read_text(encoding="utf-8").replace("**", "")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "×" in line]
    assert len(rows) == 19 + 8 + 18  # settings, against ToMe, fine-tuned
    assert [row for row in rows if row not in page] == []


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"has no results of warm_start_training_free\.py"):
        warm_start_report.main([str(tmp_path)])
