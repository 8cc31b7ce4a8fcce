"""The leaderboard: its rivals and its rule against loops over their definitions, and what it publishes."""

import copy
import math
import sys

import pandas as pd
import PIL.Image
import pytest
import torch
from helpers import EXAMPLES, ROOT, tiny_model
from torch import nn

from hpool_vit.toolkit.shared.files import read_json
from hpool_vit.toolkit.shared.measuring import count_macs


sys.path.insert(0, str(EXAMPLES / "research" / "leaderboard"))

from leaderboard import HALVES, choose_photos, print_table
from network import Attended, Method, class_attention
from photos import MEAN, STD, Photos, halves, load_photos, normalize
from rivals import (
    ATC,
    DiffRate,
    ImportanceToMe,
    PiToMe,
    SizeRanked,
    ToMe,
    average_linkage,
    energies,
    join_best,
    join_first,
    merge_groups,
)
from rules import (
    RULE,
    VERSION_01,
    Merging,
    Rule,
    find_roots,
    group,
    log_importance,
    merge,
    merge_sizes,
    split_evenly,
)
from scores import Answers, Judge, bootstrap, interpolate


RESULTS = ROOT / "docs" / "results"
VECTORS = 6


@pytest.fixture(scope="module")
def model():
    """Four blocks on 64 patches with a class token, unpooled."""
    return tiny_model(use_class_token=True, hvt_pool=None, ln_order="pre", image_size=32)


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32)


def attended(num_tokens: int, batch_size: int = 2) -> Attended:
    states = [torch.randn(batch_size, 2, num_tokens, 4).double() for _ in range(3)]
    return Attended(torch.zeros(batch_size, num_tokens, 8).double(), *states)


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first @ second / (first.norm() * second.norm())).item()


def members(groups: torch.Tensor) -> set[frozenset[int]]:
    """The groups of one image, as sets of positions."""
    return {frozenset((groups == number).nonzero().flatten().tolist()) for number in groups.unique()}


def bipartite(keys: torch.Tensor, sources: list[int], targets: list[int], num_merged: int) -> set[frozenset[int]]:
    """The groups of bipartite soft matching by the cosine of keys, one pair after the other."""
    edges = [max((cosine(keys[i], keys[j]), i, j) for j in targets) for i in sources]
    groups = {token: {token} for token in range(len(keys))}
    for _, source, target in sorted(edges, reverse=True)[:num_merged]:
        groups[target] |= groups.pop(source)
    return set(map(frozenset, groups.values()))


def test_the_opened_network_answers_as_the_model(model, images):
    network = Method(model)
    with torch.inference_mode():
        expected = model(images).logits
        torch.testing.assert_close(network(images), expected)
        torch.testing.assert_close(network.finish(network.embed(images, 2), 2), expected)


def test_a_group_becomes_its_weighted_mean():
    tokens, weights = torch.tensor([[[1.0], [2.0], [4.0], [9.0]]]), torch.tensor([[1.0, 1.0, 3.0, 2.0]])
    merged, totals = merge_groups(tokens, torch.tensor([[0, 1, 1, 0]]), 2, weights)
    assert merged.flatten().tolist() == pytest.approx([(1 + 18) / 3, (2 + 12) / 4]) and totals.tolist() == [[3, 4]]


def test_matching_numbers_the_tokens_that_stay_then_the_sources_that_are_left_then_the_targets():
    similarity = torch.tensor([[[0.1, 0.9], [0.3, 0.2]]])
    sources, targets, others = torch.tensor([[1, 3]]), torch.tensor([[2, 4]]), torch.tensor([[0, 5]])
    assert join_best(similarity, sources, targets, others, 1).tolist() == [[0, 4, 3, 2, 4, 1]]


@pytest.mark.parametrize("num_tokens", [17, 16])
@pytest.mark.parametrize("num_merged", [1, 5, 7])
def test_tome_joins_even_positions_to_odd_ones_but_the_class_token(model, num_tokens, num_merged):
    states = attended(num_tokens)
    groups = ToMe(model, {0: num_merged}).groups(0, states, None, num_merged)
    for image in range(2):
        keys = states.key[image].mean(0)
        expected = bipartite(keys, list(range(2, num_tokens, 2)), list(range(1, num_tokens, 2)), num_merged)
        assert members(groups[image]) == expected
        assert groups[image, 0] == 0


def test_tome_with_importance_weighs_by_the_class_tokens_attention_times_the_values_length(model):
    states, hidden_states, sizes = attended(9), torch.randn(2, 9, 8).double(), torch.randint(1, 4, (2, 9)).double()
    method = ImportanceToMe(model, {0: 3})
    merged, merged_sizes = method.merge(0, hidden_states, sizes, states, 3)
    groups = method.groups(0, states, sizes, 3)
    for image in range(2):
        attention = torch.zeros(9).double()
        for head in range(2):
            query, keys = states.query[image, head, 0], states.key[image, head]
            scores = [sizes[image, j].item() * math.exp((query @ keys[j]).item() / 2) for j in range(9)]
            attention += torch.tensor(scores) / sum(scores) / 2
        for number in range(6):
            chosen = [j for j in range(9) if groups[image, j] == number]
            weight = [attention[j] * states.value[image, :, j].norm() for j in chosen]
            mean = sum(w * hidden_states[image, j] for w, j in zip(weight, chosen, strict=True)) / sum(weight)
            torch.testing.assert_close(merged[image, number], mean)
            assert merged_sizes[image, number] == sizes[image, chosen].sum()


def test_energy_is_the_mean_of_cosines_above_a_margin_and_of_a_soft_penalty_below():
    similarity = torch.tensor([[[1.0, 0.7], [0.7, 1.0]]])
    expected = [(0.2 + math.exp(0.7 - 0.8) - 1) / 2] * 2
    torch.testing.assert_close(energies(similarity, 0.8), torch.tensor([expected]))


@pytest.mark.parametrize("index", [1, 2])
def test_pitome_matches_all_tokens_in_the_first_half_of_the_blocks_and_then_the_most_redundant(model, index):
    states, num_merged = attended(14), 4
    groups = PiToMe(model, {index: num_merged}, margins=(0.9, 0.1)).groups(index, states, None, num_merged)
    margin = 0.9 - 0.8 * index / 4
    for image in range(2):
        keys = states.key[image].mean(0)
        energy = {}
        for i in range(1, 14):
            above = [cosine(keys[i], keys[j]) - margin for j in range(1, 14)]
            energy[i] = sum(x if x >= 0 else math.exp(x) - 1 for x in above)
        order = sorted(energy, key=energy.get, reverse=True)
        candidates = order if index < 2 else order[: 2 * num_merged]
        assert members(groups[image]) == bipartite(keys, candidates[::2], candidates[1::2], num_merged)


def test_size_ranking_joins_the_smaller_half_to_the_larger_one(model):
    states, num_merged = attended(12), 3
    sizes = torch.stack([torch.randperm(12).double() + 1 for _ in range(2)])
    groups = SizeRanked(model, {3: num_merged}, first_ranked=2).groups(3, states, sizes, num_merged)
    for image in range(2):
        order = sorted(range(1, 12), key=lambda token, image=image: sizes[image, token])
        keys = states.key[image].mean(0)
        assert members(groups[image]) == bipartite(keys, order[:5], order[5:], num_merged)
    early = SizeRanked(model, {1: num_merged}, first_ranked=2).groups(1, states, sizes, num_merged)
    assert torch.equal(early, ToMe(model, {1: num_merged}).groups(1, states, sizes, num_merged))


@pytest.mark.parametrize("num_clusters", [1, 4, 9])
def test_average_linkage_joins_the_two_clusters_nearest_on_average(num_clusters):
    points = torch.rand(9, 3).double()
    distances = torch.cdist(points, points)
    clusters = [{token} for token in range(9)]
    while len(clusters) > num_clusters:
        pairs = [(a, b) for a in clusters for b in clusters if min(a) < min(b)]
        a, b = min(pairs, key=lambda pair: distances[sorted(pair[0])][:, sorted(pair[1])].mean())
        clusters = [cluster for cluster in clusters if cluster not in (a, b)] + [a | b]
    found = torch.from_numpy(average_linkage(distances.numpy(), num_clusters))
    assert members(found) == set(map(frozenset, clusters))


def test_atc_leaves_the_class_token_alone(model):
    groups = ATC(model, {1: 9}).groups(1, attended(13), None, 9)
    assert (groups[:, 0] == 0).all() and (groups[:, 1:] > 0).all()
    assert all(image.unique().tolist() == [0, 1, 2, 3] for image in groups)


def test_diffrate_joins_the_last_tokens_to_the_first_without_weighing_and_adds_size_times_cosine():
    hidden_states, sizes = torch.randn(2, 9, 8).double(), torch.randint(1, 4, (2, 9)).double()
    merged, merged_sizes = join_first(hidden_states, sizes, 5)
    for image in range(2):
        groups = {j: [j] for j in range(5)}
        expected_sizes = sizes[image, :5].clone()
        for i in range(5, 9):
            best, target = max((cosine(hidden_states[image, i], hidden_states[image, j]), j) for j in range(1, 5))
            groups[target].append(i)
            expected_sizes[target] += sizes[image, i] * best
        expected = torch.stack([hidden_states[image, groups[j]].mean(0) for j in range(5)])
        torch.testing.assert_close(merged[image], expected)
        torch.testing.assert_close(merged_sizes[image], expected_sizes)


def test_diffrate_drops_the_tokens_that_the_class_token_looks_at_least(model, images):
    network = Method(model)
    hidden_states = network.embed(images)
    states = network.attend(0, hidden_states, None)
    attention = class_attention(states.query, states.key, None).mean(1)[:, 1:]
    kept = attention.topk(9).indices.sort().values
    with torch.inference_mode():
        left, sizes = DiffRate(model, [10] * 4, [10] * 4).run_block(0, hidden_states, None)
        attended_to = hidden_states + states.branch
        expected = torch.stack([attended_to[i, torch.cat((torch.zeros(1, dtype=int), kept[i] + 1))] for i in range(3)])
        expected = expected + network.feed_forward(network.layers[0], expected)
    assert left.shape == (3, 10, 32) and (sizes == 1).all()
    for image in range(3):
        # In another order.
        distances = torch.cdist(left[image], expected[image])
        assert distances.min(1).values.max() < 1e-4 and distances.min(0).values.max() < 1e-4


@pytest.mark.parametrize("method", [ToMe, ImportanceToMe, PiToMe, SizeRanked, ATC, DiffRate])
def test_the_macs_of_every_rival_are_counted_which_follows_gradients(model, images, method):
    settings = ([10] * 4, [9] * 4) if method is DiffRate else (dict.fromkeys(range(4), 9),)
    assert next(model.parameters()).requires_grad
    assert 0 < count_macs(method(model, *settings), images[:1]) < count_macs(Method(model), images[:1])


@pytest.mark.parametrize("method", [ToMe, ImportanceToMe, PiToMe, SizeRanked])
def test_merging_in_every_block_ends_when_half_of_the_tokens_would_go(model, images, method):
    with torch.inference_mode():
        hidden_states, sizes = Method(model).embed(images), None
        for index, left in enumerate((44, 24, 12, 6)):
            hidden_states, sizes = method(model, dict.fromkeys(range(4), 20)).run_block(index, hidden_states, sizes)
            assert hidden_states.shape[1] == 1 + left
            assert (sizes.sum(1) == 65).all() and (sizes[:, 0] == 1).all()


def merge_one_by_one(tokens: torch.Tensor, weights: torch.Tensor, num_merged: int, rule: Rule) -> list[int]:
    """The position of the token that each token of one image joins, in loops, as the rule says it in words."""
    groups = {position: [position] for position in range(len(tokens))}

    def centre(position: int) -> tuple[torch.Tensor, float]:
        own = weights[groups[position]]
        return (own[:, None] * tokens[groups[position]]).sum(0) / own.sum(), own.sum().item()

    def loss(source: int, target: int) -> float:
        (a, w_a), (b, w_b) = centre(source), centre(target)
        return (a - b).square().sum().item() * (w_a * w_b / (w_a + w_b) if rule.ward else 1)

    for number in split_evenly(num_merged, rule.num_rounds):
        sources = [position for position in groups if position % 2]
        targets = [position for position in groups if position % 2 == 0]
        pairs = sorted(min((loss(source, target), source, target) for target in targets) for source in sources)
        for _, source, target in pairs[:number]:
            groups[target] = groups[target] + groups.pop(source)
    return [next(root for root in groups if position in groups[root]) for position in range(len(tokens))]


RULES = [
    VERSION_01,
    RULE,
    RULE._replace(num_rounds=1),
    RULE._replace(num_rounds=3, ward=False),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("num_tokens", "num_merged"), [(16, 8), (17, 8), (17, 5), (16, 3), (2, 1)])
def test_the_rule_merges_what_loops_over_its_definition_merge(rule, num_tokens, num_merged):
    tokens, weights = torch.randn(3, num_tokens, VECTORS), torch.rand(3, num_tokens) + 0.1
    roots = find_roots(tokens, weights, num_merged, rule)
    for image in range(3):
        expected = merge_one_by_one(tokens[image].double(), weights[image].double(), num_merged, rule)
        assert roots[image].tolist() == expected


def test_a_merged_token_is_the_weighted_mean_of_its_members_and_as_long_as_they_are_on_average():
    tokens, weights = torch.randn(1, 5, VECTORS).double(), torch.tensor([[1.0, 2.0, 0.5, 3.0, 4.0]]).double()
    groups = group(torch.tensor([[0, 3, 0, 3, 3]]), 3)
    assert groups.staying.tolist() == [[0, 3]] and groups.moving.tolist() == [[1, 2, 4]]
    plain, stretched = merge(tokens, weights, groups), merge(tokens, weights, groups, keeps_norm=True)
    for number, members_ in enumerate(([0, 2], [1, 3, 4])):
        share = weights[0, members_] / weights[0, members_].sum()
        torch.testing.assert_close(plain[0, number], share @ tokens[0, members_])
        torch.testing.assert_close(stretched[0, number].norm(), share @ tokens[0, members_].norm(dim=-1))
        assert cosine(plain[0, number], stretched[0, number]) == pytest.approx(1)
    assert merge_sizes(torch.tensor([[1.0, 2, 1, 3, 1]]), groups).tolist() == [[2, 6]]


def test_a_token_that_nothing_joins_stays_exactly_as_it_is():
    tokens = torch.randn(2, 8, VECTORS)
    groups = group(find_roots(tokens, torch.ones(2, 8), 1, RULE), 1)
    merged = merge(tokens, torch.ones(2, 8), groups, keeps_norm=True)
    for image in range(2):
        alone = groups.joins[image].sum(-1) == 0
        torch.testing.assert_close(merged[image, alone], tokens[image, groups.staying[image, alone]])


def test_importance_is_the_geometric_mean_over_the_heads_of_the_class_tokens_attention(model, images):
    network = Method(model)
    with torch.inference_mode():
        hidden_states = network.embed(images, 2)
        states = network.attend(2, hidden_states, None)
        attention = class_attention(states.query, states.key, None)[:, :, 1:]
        expected = attention.log().mean(1)
        found = log_importance(model.hpool_vit.layers[2], hidden_states)
    # A constant per image is free.
    torch.testing.assert_close(found - found.mean(1, keepdim=True), expected - expected.mean(1, keepdim=True))


def test_without_its_ingredients_the_rule_is_that_of_version_01(images):
    ratios = [20 / 64, 15 / 44]
    options = {"use_class_token": True, "ln_order": "pre", "hvt_pool": None}
    merging = options | {"pool_mode": "merge", "proportional_attention": True, "hvt_pool": [1, 3]}
    model, expected = tiny_model(**options), tiny_model(**merging, merge_ratio=ratios)
    expected.load_state_dict(model.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(Merging(model, {1: 20, 3: 15}, VERSION_01)(images), expected(images).logits)


def test_sizes_count_patches_whatever_the_importance(model, images):
    method = Merging(model, {1: 20, 3: 22})
    with torch.inference_mode():
        hidden_states, sizes = method.before_block(1, method.embed(images), None)
        hidden_states, sizes = method.before_block(3, hidden_states, sizes)
    assert hidden_states.shape == (3, 1 + 22, 32) and sizes.shape == (3, 1 + 22)
    assert (sizes.sum(1) == 65).all() and (sizes == sizes.round()).all()


def test_a_last_block_for_the_class_token_alone_changes_no_answer(model, images):
    short = Merging(model, {1: 20, 3: 15}, RULE._replace(class_token_only=True))
    image = images[:1]
    with torch.inference_mode():
        torch.testing.assert_close(short(images), Merging(model, {1: 20, 3: 15})(images))
    assert count_macs(short, image) < count_macs(Merging(model, {1: 20, 3: 15}), image)


def test_a_class_token_that_looks_at_one_patch_alone_leaves_no_weight_at_zero(model, images):
    method = Merging(model, {1: 20})
    hidden_states = method.embed(images)
    hidden_states[:, 1] *= 1e4
    strong = copy.deepcopy(model.hpool_vit.layers[1].attention.k_proj.weight)
    with torch.inference_mode():
        model.hpool_vit.layers[1].attention.k_proj.weight.mul_(1000)
        merged, _ = method.before_block(1, hidden_states, None)
        model.hpool_vit.layers[1].attention.k_proj.weight.copy_(strong)
    assert merged.isfinite().all()


@pytest.mark.slow
def test_the_rule_exports_without_scattering_floats_and_answers_alike(model, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    method, path = Merging(model, {1: 20, 3: 15}).eval(), tmp_path / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        method, (images,), dynamo=True, verbose=False, dynamic_shapes=({0: batch},), optimize=True
    )
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    for batch in (images, torch.randn(5, 3, 32, 32)):
        with torch.inference_mode():
            expected = method(batch)
        torch.testing.assert_close(
            torch.tensor(session.run(None, {name: batch.numpy()})[0]), expected, atol=1e-4, rtol=1e-4
        )


def test_the_halves_share_no_photo_and_are_always_the_same():
    choosing, reporting = halves(1300)
    assert len(choosing) == len(reporting) == 650
    assert torch.equal(torch.cat((choosing, reporting)).sort().values, torch.arange(1300))
    assert torch.equal(halves(1300)[0], choosing)


def test_a_half_or_all_photos_are_chosen_and_their_labels_translated():
    photos = Photos(torch.arange(8), torch.arange(8) % 2)
    chosen = {half: choose_photos(photos, half, [310, 309], None) for half in ("choosing", "reporting", "all")}
    assert [len(part.labels) for part in chosen.values()] == [4, 4, 8]
    both = torch.cat([chosen[half].pixels for half in HALVES])
    assert torch.equal(both.sort().values, torch.arange(8))
    assert chosen["all"].labels.tolist() == [310, 309] * 4
    assert choose_photos(photos, "reporting", None, 2).pixels.tolist() == halves(8)[1][:2].tolist()


def test_photos_are_decoded_once(tmp_path):
    image = PIL.Image.new("RGB", (227, 227), (255, 0, 0))
    image.save(tmp_path / "photo.png")
    table = pd.DataFrame({"image": [{"bytes": (tmp_path / "photo.png").read_bytes()}], "label": [7]})
    table.to_parquet(tmp_path / "photos.parquet")
    photos = load_photos(tmp_path / "photos.parquet", tmp_path / "cache.pt")
    assert photos.pixels.shape == (1, 3, 224, 224) and photos.labels.tolist() == [7]
    red = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(normalize(photos.pixels)[0, :, 5, 5], red)
    (tmp_path / "photos.parquet").unlink()
    again = load_photos(tmp_path / "photos.parquet", tmp_path / "cache.pt")
    assert torch.equal(again.pixels, photos.pixels) and torch.equal(again.labels, photos.labels)


def test_a_method_is_judged_by_what_it_answers_from_the_first_pixel_on(model):
    photos = Photos(torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8), torch.arange(5) % 3)
    method = Merging(model, {2: 20})
    answers = Judge(model, photos, batch_size=2).answers(method)
    with torch.inference_mode():
        logits, reference = method(normalize(photos.pixels)), Method(model)(normalize(photos.pixels))
    expected = nn.functional.kl_div(logits.log_softmax(-1), reference.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(answers.divergence.float(), expected, atol=1e-5, rtol=1e-4)
    assert answers.correct.bool().tolist() == (logits.argmax(-1) == photos.labels).tolist()
    assert answers.agrees.bool().tolist() == (logits.argmax(-1) == reference.argmax(-1)).tolist()


def test_between_two_settings_each_photo_is_interpolated():
    def answers(value: float) -> Answers:
        return Answers(*(torch.full((2,), value) for _ in range(3)))

    curve = [(30.0, answers(0.0)), (10.0, answers(4.0)), (20.0, answers(1.0))]
    assert interpolate(12.5, curve).divergence.tolist() == [3.25, 3.25]
    assert interpolate(30.0, curve).correct.tolist() == [0, 0]
    assert interpolate(9.0, curve) is None


def test_the_interval_holds_the_mean_and_shrinks_with_the_number_of_photos():
    few, many = torch.randn(50).double() + 1, torch.randn(800).double() + 1
    for differences in (few, many):
        low, high = bootstrap(differences, num_samples=2000)
        assert low < differences.mean() < high
        assert high - low == pytest.approx(2 * 1.96 * differences.std().item() / len(differences) ** 0.5, rel=0.15)
    assert bootstrap(few) == bootstrap(few)


def test_the_published_tables_are_those_of_the_raw_numbers(capsys):
    text = (RESULTS / "merging.md").read_text(encoding="utf-8")
    board, ingredients = (read_json(RESULTS / f"merging_{name}.json") for name in ("leaderboard", "ingredients"))
    for table in (board["rows"], *ingredients["schedules"].values()):
        print_table(table)
        assert capsys.readouterr().out in text
    for published in (board, ingredients):
        assert published["half"] == "reporting" and published["num_photos"] == 650
