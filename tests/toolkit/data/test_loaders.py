"""Batches depend on seed and epoch alone, lose no image, and survive bad ones."""

import pickle
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from image_files import BAD_FILES, CONVERTED_FILES, write_folder, write_parquet, write_tar
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from hpool_vit import HPoolViTImageProcessor
from hpool_vit.toolkit.data.loaders import make_train_loader, make_validation_loader, set_epoch, shuffled
from hpool_vit.toolkit.data.sources import DataArguments, load_image_data
from hpool_vit.toolkit.shared.images import BadImageError, BadImages, DataError, TooManyBadImagesError
from hpool_vit.toolkit.training.recipes import RecipeArguments, batch_mixing, train_transform, validation_transform


TO_TENSOR = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
AUGMENT = v2.Compose([v2.RandomResizedCrop(8), v2.RandAugment(), *TO_TENSOR, v2.RandomErasing(p=0.5)])
RESIZE = v2.Compose([v2.Resize((8, 8)), *TO_TENSOR])
MIX = v2.RandomChoice([v2.MixUp(num_classes=3), v2.CutMix(num_classes=3)])

tables_and_streams = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
with_and_without_workers = pytest.mark.parametrize("num_workers", [0, 2])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 sound images of 3 classes."""
    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def images_with_bad_ones(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("mixed"))
    for name, (data, _) in {**BAD_FILES, **CONVERTED_FILES}.items():
        (folder / "bee" / name).write_bytes(data)
    return folder


def load(folder, **kwargs):
    args = DataArguments(train_dir=str(folder), validation_dir=str(folder), **kwargs)
    return load_image_data(args, seed=0), args


def load_stream(files, **kwargs):
    names = {"train_files": [str(files)], "validation_files": [str(files)], "class_names": ["a", "b"]}
    args = DataArguments(**names, streaming=True, **kwargs)
    return load_image_data(args, seed=0), args


def train_loader(loaded, batch_size=4, transform=AUGMENT, **kwargs):
    return make_train_loader(*loaded, transform, batch_size=batch_size, **{"seed": 0, **kwargs})


def epoch_of(loader, epoch=0) -> list[dict]:
    set_epoch(loader, epoch)
    return list(loader)


def error_of(loader) -> DataError:
    try:
        epoch_of(loader)
    except DataError as error:
        # With its traceback it would hold the workers, which then take seconds to end.
        return error.with_traceback(None)
    pytest.fail("no DataError was raised")


def names_of(batches) -> list[str]:
    return [name for batch in batches for name in batch["names"]]


def by_name(batches) -> dict[str, torch.Tensor]:
    images = [image for batch in batches for image in batch["pixel_values"]]
    return dict(zip(names_of(batches), images, strict=True))


def assert_same(first: list[dict], second: list[dict]):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one["names"] == other["names"]
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert torch.equal(one["labels"], other["labels"])


def test_a_batch_has_pixels_labels_names_and_no_bad_images(images):
    batch = epoch_of(train_loader(load(images)))[0]
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64
    classes = {"ant": 0, "bee": 1, "cat": 2}
    assert [classes[name.split("/")[-2]] for name in batch["names"]] == batch["labels"].tolist()
    assert batch["bad_images"] == []


@tables_and_streams
def test_an_image_looks_the_same_with_any_number_of_workers_and_processes(images, streaming):
    loaded = load(images, streaming=streaming)
    alone = by_name(epoch_of(train_loader(loaded), 3))
    assert len(alone) == 24
    others = [epoch_of(train_loader(loaded, num_workers=2), 3)]
    others += [epoch_of(train_loader(loaded, rank=rank, world_size=2), 3) for rank in range(2)]
    for batches in others:
        for name, image in by_name(batches).items():
            assert torch.equal(image, alone[name])


def test_the_order_of_a_table_does_not_depend_on_the_workers(images):
    loaded = load(images)
    without, with_two = (train_loader(loaded, num_workers=number, mix=MIX) for number in (0, 2))
    assert_same(epoch_of(without), epoch_of(with_two))


@tables_and_streams
@with_and_without_workers
def test_epochs_differ_and_come_again_to_the_bit(images, streaming, num_workers):
    loader = train_loader(load(images, streaming=streaming), num_workers=num_workers)
    first, second, again = epoch_of(loader, 0), epoch_of(loader, 1), epoch_of(loader, 0)
    assert_same(first, again)
    assert names_of(first) != names_of(second)
    looks = by_name(first), by_name(second)
    assert not any(torch.equal(image, looks[1][name]) for name, image in looks[0].items())


@tables_and_streams
def test_seeds_differ(images, streaming):
    loaded = load(images, streaming=streaming)
    assert names_of(epoch_of(train_loader(loaded, seed=0))) != names_of(epoch_of(train_loader(loaded, seed=1)))


@tables_and_streams
@with_and_without_workers
def test_no_global_random_number_is_drawn(images, streaming, num_workers):
    loaded = load(images, streaming=streaming)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    epoch_of(train_loader(loaded, num_workers=num_workers, mix=MIX))
    list(make_validation_loader(*loaded, RESIZE, batch_size=4, num_workers=num_workers))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


@tables_and_streams
def test_an_epoch_has_each_image_once_but_for_a_rest_smaller_than_a_batch(images, streaming):
    loader = train_loader(load(images, streaming=streaming), batch_size=5)
    for epoch in range(2):
        batches = epoch_of(loader, epoch)
        assert len(batches) == len(loader) == 4
        assert all(len(batch["names"]) == 5 for batch in batches)
        assert len(set(names_of(batches))) == 20


def test_two_processes_see_together_what_one_sees_with_twice_the_batch(images):
    loaded = load(images)
    for repeats in (1, 3):
        alone = epoch_of(train_loader(loaded, batch_size=6, repeats=repeats), 1)
        ranks = [
            epoch_of(train_loader(loaded, batch_size=3, repeats=repeats, rank=rank, world_size=2), 1)
            for rank in range(2)
        ]
        for batch, *parts in zip(alone, *ranks, strict=True):
            assert batch["names"] == parts[0]["names"] + parts[1]["names"]
            assert torch.equal(batch["pixel_values"], torch.cat([part["pixel_values"] for part in parts]))


@tables_and_streams
@with_and_without_workers
def test_an_epoch_goes_on_in_the_middle_as_if_never_left(images, streaming, num_workers):
    loaded = load(images, streaming=streaming)
    unbroken = epoch_of(train_loader(loaded, num_workers=num_workers, mix=MIX), 1)
    loader = train_loader(loaded, num_workers=num_workers, mix=MIX)
    rest = skip_first_batches(loader, 2)
    set_epoch(loader, 1)
    assert_same(list(rest), unbroken[2:])
    assert_same(epoch_of(rest, 1), unbroken[2:])
    assert_same(epoch_of(loader, 2), epoch_of(train_loader(loaded, num_workers=num_workers, mix=MIX), 2))


@tables_and_streams
def test_repeated_augmentation_shows_an_image_several_times_and_each_time_differently(images, streaming):
    loader = train_loader(load(images, streaming=streaming), batch_size=12, repeats=3)
    epochs = [epoch_of(loader, epoch) for epoch in range(3)]
    for batches in epochs:
        assert len(batches) == 2
        assert set(Counter(names_of(batches)).values()) == {3}
        for batch in batches:
            assert len({image.numpy().tobytes() for image in batch["pixel_values"]}) == 12
            # MixUp mixes each image with the one before it.
            assert all(name != before for name, before in zip(batch["names"][1:], batch["names"], strict=False))
    if streaming:
        assert len({name for batches in epochs for name in names_of(batches)}) == 24


def test_repeats_that_do_not_divide_the_batch_keep_the_length_of_the_epoch(images):
    for streaming in (False, True):
        loader = train_loader(load(images, streaming=streaming), batch_size=4, repeats=3)
        assert [len(batch["names"]) for batch in epoch_of(loader)] == [4] * 6


def test_a_mixed_batch_has_shares_as_labels(images):
    loaded = load(images)
    plain, mixed = epoch_of(train_loader(loaded)), epoch_of(train_loader(loaded, mix=MIX))
    assert names_of(plain) == names_of(mixed)
    labels = torch.stack([batch["labels"] for batch in mixed])
    assert labels.shape == (6, 4, 3)
    torch.testing.assert_close(labels.sum(-1), torch.ones(6, 4))
    assert len(labels.max(-1).values.unique()) > 3
    assert not torch.equal(plain[0]["pixel_values"], mixed[0]["pixel_values"])


@pytest.mark.parametrize("world_size, num_workers, expected_workers", [(3, 4, 1), (2, 2, 2), (1, 2, 2)])
def test_every_process_of_a_stream_has_as_many_batches_whatever_its_shards(
    tmp_path, world_size, num_workers, expected_workers
):
    sizes = [2, 10, 5]
    for shard, size in enumerate(sizes):
        write_tar(tmp_path / f"{shard}.tar", [0, 1] * size, first=100 * shard)
    loaded = load_stream(tmp_path / "*.tar", num_train_images=34)
    validated = []
    for rank in range(world_size):
        split = {"rank": rank, "world_size": world_size, "num_workers": num_workers}
        loader = train_loader(loaded, batch_size=2, **split)
        assert loader.num_workers == expected_workers
        assert [len(batch["names"]) for batch in epoch_of(loader)] == [2] * (34 // (2 * world_size))
        assert len(loader) == 34 // (2 * world_size)
        validated += names_of(make_validation_loader(*loaded, RESIZE, batch_size=3, **split))
    assert len(validated) == len(set(validated)) == 34


@tables_and_streams
@with_and_without_workers
def test_bad_images_are_left_out_of_training_and_reported(images_with_bad_ones, streaming, num_workers):
    loader = train_loader(load(images_with_bad_ones, streaming=streaming), batch_size=2, num_workers=num_workers)
    bad_images, names = BadImages(), []
    for epoch in range(2):
        batches = epoch_of(loader, epoch)
        assert [len(batch["names"]) for batch in batches] == [2] * len(loader)
        names += names_of(batches)
        for batch in batches:
            bad_images.add(batch["bad_images"])
    bad_images.check(max_bad_images=len(BAD_FILES))
    for name, (_, reason) in {**BAD_FILES, **CONVERTED_FILES}.items():
        path = str(images_with_bad_ones / "bee" / name)
        assert bad_images.records[path]["kind"] == ("skipped" if name in BAD_FILES else "converted")
        assert bad_images.records[path]["reason"].startswith(reason)
        assert (path in names) == (name in CONVERTED_FILES)
    assert len(bad_images.records) == len(BAD_FILES) + len(CONVERTED_FILES)
    assert len(set(names)) == 24 + len(CONVERTED_FILES)


@tables_and_streams
@with_and_without_workers
@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_counts_every_sound_image_once(images_with_bad_ones, streaming, num_workers, world_size):
    loaded = load(images_with_bad_ones, streaming=streaming)
    num_images, counted, placeholders, num_batches = 24 + len(CONVERTED_FILES), [], [], []
    for rank in range(world_size):
        loader = make_validation_loader(
            *loaded, RESIZE, batch_size=5, rank=rank, world_size=world_size, num_workers=num_workers
        )
        batches = list(loader)
        num_batches.append(len(batches))
        for batch in batches:
            for name, label, image in zip(batch["names"], batch["labels"], batch["pixel_values"], strict=True):
                (placeholders if label == -100 else counted).append(name)
                assert label != -100 or not image.any()
    assert len(counted) == len(set(counted)) == num_images
    assert {name.rsplit("/", 1)[-1] for name in placeholders if name} == set(BAD_FILES)
    if not streaming:
        assert len(set(num_batches)) == 1
        assert len(counted) + len(placeholders) == -(-(num_images + len(BAD_FILES)) // world_size) * world_size


@tables_and_streams
@with_and_without_workers
def test_a_bad_image_can_end_the_run_with_one_line(images_with_bad_ones, streaming, num_workers):
    loaded = load(images_with_bad_ones, streaming=streaming, on_bad_image="fail")
    error = error_of(train_loader(loaded, num_workers=num_workers))
    assert isinstance(error, BadImageError)
    assert re.fullmatch(r"/.*/bee/\w+\.\w+ is \w+.*\(`on_bad_image='fail'`\)", str(error))


@tables_and_streams
@with_and_without_workers
@pytest.mark.parametrize("max_bad_images", [3, 100])
def test_images_that_are_all_bad_end_the_run(tmp_path, streaming, num_workers, max_bad_images):
    for index in range(20):
        path = tmp_path / "ab"[index % 2] / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    loaded = load(tmp_path, streaming=streaming, max_bad_images=max_bad_images)
    error = error_of(train_loader(loaded, num_workers=num_workers))
    assert isinstance(error, TooManyBadImagesError)
    expected = "4 images are bad, more than `max_bad_images=3`" if max_bad_images == 3 else "No.* can be read"
    assert re.fullmatch(f"{expected}.*", str(error))


def test_fewer_images_than_a_batch_are_refused(images):
    with pytest.raises(DataError, match="24 training images do not fill one batch of 13 on 2 process"):
        train_loader(load(images), batch_size=13, world_size=2)


@with_and_without_workers
def test_a_damaged_stream_ends_the_run_with_one_line(tmp_path, num_workers):
    unknown = write_tar(tmp_path / "unknown.tar", [0, 1] * 3 + [7])
    cut = write_tar(tmp_path / "cut.tar", [0, 1] * 4)
    cut.write_bytes(cut.read_bytes()[:23_000])
    for path, expected in (
        (unknown, "unknown.tar/0006.png has the label 7"),
        (cut, ".*cut.tar cannot be read to the end"),
    ):
        error = error_of(train_loader(load_stream(path, num_train_images=8), num_workers=num_workers))
        assert re.fullmatch(f"{expected}.*", str(error))


def test_a_stream_of_parquet_files_is_shared_out_by_row_groups(tmp_path, monkeypatch):
    # `datasets` waits so many seconds for its threads at the end.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    path = write_parquet(tmp_path / "a.parquet", ["a", "b"] * 12, row_group_size=6)
    loaded = load_stream(path)
    names = []
    for rank in range(2):
        loader = train_loader(loaded, batch_size=3, rank=rank, world_size=2, num_workers=2)
        names += names_of(epoch_of(loader))
    assert len(names) == len(set(names)) == 24


class StreamOfAnEarlierVersion:
    """What `datasets` 5.0 does: one shard remains of several that are mixed."""

    def __init__(self, num_shards: int):
        self.num_shards = num_shards

    def shuffle(self, seed, buffer_size, max_buffer_input_shards=10):
        return StreamOfAnEarlierVersion(self.num_shards if max_buffer_input_shards == 1 else 1)


def test_a_shuffled_stream_keeps_its_shards_for_the_workers(tmp_path):
    write_tar(tmp_path / "0.tar", [0, 1])
    write_tar(tmp_path / "1.tar", [0, 1])
    (data, _) = load_stream(tmp_path / "*.tar", num_train_images=4)
    for stream in (data.train.dataset, StreamOfAnEarlierVersion(2)):
        assert shuffled(stream, seed=0, buffer_size=10).num_shards == stream.num_shards == 2


@tables_and_streams
@pytest.mark.parametrize("crop", ["random_resized", "center"])
def test_workers_that_are_not_forked_get_images_and_mixing_pickled(images, streaming, crop):
    loaded = load(images, streaming=streaming)
    processor = HPoolViTImageProcessor(size={"shortest_edge": 9}, crop_size={"height": 8, "width": 8})
    recipe = RecipeArguments(train_crop=crop, horizontal_flip=0.0, mixup_alpha=0.8, cutmix_alpha=1.0)
    loaders = [
        train_loader(loaded, transform=train_transform(recipe, processor), mix=batch_mixing(recipe, 3)),
        make_validation_loader(*loaded, validation_transform(processor), batch_size=4),
    ]
    for loader in loaders:
        dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
        batches = {"batch_size": 4} if streaming else {"batch_sampler": loader.batch_sampler}
        assert_same(list(DataLoader(dataset, collate_fn=collate, **batches)), list(loader))
