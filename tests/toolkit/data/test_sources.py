"""Images are found in every kind of source, and whatever is wrong with the data is said in one line."""

import os
from collections import Counter

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value
from image_files import encoded, picture, write_folder, write_parquet, write_tar
from transformers import HfArgumentParser, TrainingArguments

from hpool_vit.toolkit.data.sources import DataArguments, load_image_data
from hpool_vit.toolkit.shared.images import DataError, decode_image, read_image


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What `datasets` prepares stays in the test's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def load(seed=0, **kwargs):
    return load_image_data(DataArguments(**kwargs), seed)


def refusal(**kwargs) -> str:
    with pytest.raises(DataError) as error:
        load(**kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def labels_by_name(source) -> dict[str, int]:
    """The class of each image, read as the loaders read it."""
    if source.is_stream:
        examples = [(example, source.label(example[source.label_column], "")) for example in source.dataset]
    else:
        labels = zip(source.rows.tolist(), source.labels.tolist(), strict=True)
        examples = [(source.dataset[row], label) for row, label in labels]
    return {source.name(example).rsplit("/", 1)[-1]: label for example, label in examples}


def test_the_fields_are_flags_with_help_beside_the_trainers(tmp_path):
    parser = HfArgumentParser((DataArguments, TrainingArguments))
    flags = ["--train_files", "a.tar", "b.tar", "--streaming", "--class_names", "ant", "bee"]
    args, _ = parser.parse_args_into_dataclasses([*flags, "--output_dir", str(tmp_path)])
    assert (args.train_files, args.class_names, args.streaming) == (["a.tar", "b.tar"], ["ant", "bee"], True)
    assert all(field.metadata["help"] for field in DataArguments.__dataclass_fields__.values())


@pytest.mark.parametrize("streaming", [False, True])
def test_the_digits_bring_their_own_validation_images(streaming):
    data = load(dataset_name="digits", streaming=streaming)
    assert data.train.is_stream == data.validation.is_stream == streaming
    assert data.describe() == {
        "train": "digits, split train",
        "validation": "digits, split test",
        "num_train_images": 1437,
        "num_validation_images": 360,
        "class_names": [str(digit) for digit in range(10)],
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_is_read_where_it_lies_whatever_its_path_is_called(tmp_path, streaming):
    # `datasets` would take these names for names of splits and for patterns.
    folder = write_folder(tmp_path / "test [1]" / "validation")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "ant" / "notes.txt").write_text("no image")
    (folder / "bee" / "deeper").mkdir()
    (folder / "bee" / "deeper" / "9.JPG").write_bytes(encoded(picture(), "JPEG"))
    data = load(train_dir=str(folder), validation_dir=str(folder), streaming=streaming)
    assert data.class_names == ["ant", "bee", "cat"]
    assert data.train.num_images == data.validation.num_images == 25
    examples = list(data.train.dataset)
    assert {example["image"]["path"] for example in examples} >= {f"{folder}/ant/0.png", f"{folder}/bee/deeper/9.JPG"}
    assert all(example["image"]["bytes"] is None for example in examples)
    assert not (tmp_path / "cache").exists()


def test_a_missing_validation_split_is_made_stratified_and_by_the_seed_alone(tmp_path):
    folder = write_folder(tmp_path / "images", per_class=10)
    splits = [load(train_dir=str(folder), validation_share=0.2, seed=seed) for seed in (0, 0, 1)]
    for data in splits:
        assert Counter(data.train.labels.tolist()) == {0: 8, 1: 8, 2: 8}
        assert Counter(data.validation.labels.tolist()) == {0: 2, 1: 2, 2: 2}
        assert sorted([*data.train.rows, *data.validation.rows]) == list(range(30))
    rows = [data.validation.rows.tolist() for data in splits]
    assert rows[0] == rows[1] != rows[2]
    assert splits[0].validation.description == f"6 images of {folder}, stratified, seed 0"
    assert sorted(load(train_dir=str(folder), validation_share=0.01).validation.labels.tolist()) == [0, 1, 2]


def test_fewer_images_are_a_random_selection(tmp_path):
    folder = str(write_folder(tmp_path / "images"))
    data = load(train_dir=folder, validation_dir=folder, max_train_images=9, max_validation_images=100)
    assert (data.train.num_images, data.validation.num_images) == (9, 24)
    assert len(set(data.train.rows)) == 9
    assert len(set(data.train.labels)) > 1


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_are_found_by_globs_and_plain_columns_by_their_names(tmp_path, streaming):
    (tmp_path / "test[1]").mkdir()
    for shard in range(3):
        write_parquet(tmp_path / "test[1]" / f"{shard}.parquet", ["bee", "ant"] * 2, first=4 * shard)
    # In brackets the folder would be a pattern for its own name.
    files = [f"{tmp_path}/test[[]1]/*.parquet"]
    data = load(train_files=files, validation_files=files, streaming=streaming, class_names=["ant", "bee"])
    assert (data.train.is_stream, data.train.num_images) == (streaming, 12)
    assert labels_by_name(data.train) == {f"{index}.png": (index + 1) % 2 for index in range(12)}
    assert labels_by_name(data.validation) == labels_by_name(data.train)


@pytest.mark.parametrize("streaming", [False, True])
def test_tar_files_may_have_numbers_or_names_as_labels(tmp_path, streaming):
    numbers = str(write_tar(tmp_path / "numbers.tar", [1, 0, 1]))
    names = str(write_tar(tmp_path / "names.tar", ["bee", "ant", "bee"], label_ending="txt"))
    options = {"class_names": ["ant", "bee"], "streaming": streaming, "num_train_images": 3 if streaming else None}
    from_numbers = load(train_files=[numbers], validation_files=[numbers], **options)
    from_names = load(train_files=[names], validation_files=[names], label_column="txt", **options)
    expected = {"0000.png": 1, "0001.png": 0, "0002.png": 1}
    assert labels_by_name(from_numbers.train) == labels_by_name(from_names.validation) == expected
    example = next(iter(from_numbers.train.dataset))
    assert from_numbers.train.name(example) == "numbers.tar/0000.png"


def test_a_folder_that_datasets_can_load_is_a_data_set(tmp_path):
    for split in ("train", "test"):
        write_folder(tmp_path / "images" / split, per_class=3 if split == "train" else 1)
    name = str(tmp_path / "images")
    data = load(dataset_name=name)
    assert (data.train.num_images, data.validation.num_images) == (9, 3)
    assert data.validation.description == f"{name}, split test"
    swapped = load(dataset_name=name, train_split="test", validation_split="train")
    assert (swapped.train.num_images, swapped.validation.num_images) == (3, 9)
    assert "has the splits train, test" in refusal(dataset_name=name, validation_split="val")


def test_images_without_a_file_are_named_by_their_row_or_checksum(tmp_path):
    images = [{"bytes": encoded(picture(index)), "path": None} for index in range(20)]
    features = Features({"image": Image(), "label": ClassLabel(names=["ant", "bee"])})
    Dataset.from_dict({"image": images, "label": [0, 1] * 10}, features=features).to_parquet(tmp_path / "a.parquet")
    files = [str(tmp_path / "a.parquet")]
    data = load(train_files=files)
    row = int(data.validation.rows[0])
    assert data.validation.name(data.validation.dataset[row], row) == f"train[{row}]"
    stream = load(train_files=files, validation_files=files, streaming=True).train
    names = [stream.name(example) for example in stream.dataset]
    assert len(set(names)) == 20 and names[0].startswith("train[CRC-32 ")


def test_plain_labels_are_named_by_their_sorted_values(tmp_path):
    for name, values, names in (("ints", [7, 3, 3, 7] * 5, ["3", "7"]), ("words", ["b", "a"] * 10, ["a", "b"])):
        path = write_parquet(tmp_path / f"{name}.parquet", values)
        data = load(train_files=[str(path)])
        assert data.class_names == names
        assert Counter(data.train.labels.tolist()) == {0: 9, 1: 9}
    renamed = load(train_files=[str(path)], validation_share=0.5, class_names=["b", "a"])
    assert renamed.class_names == ["b", "a"]
    values = renamed.train.dataset["label"][:]
    assert [values[row] for row in renamed.train.rows] == [["b", "a"][label] for label in renamed.train.labels]


def test_validation_classes_are_matched_by_name(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["ant", "bee"] * 4)
    folder = write_folder(tmp_path / "images", classes=("bee", "ant"), per_class=2)
    files = str(tmp_path / "train.parquet")
    data = load(train_files=[files], validation_dir=str(folder), class_names=["bee", "ant"])
    assert set(labels_by_name(data.train).values()) == {0, 1}
    paths = [data.validation.dataset[int(row)]["image"]["path"] for row in data.validation.rows]
    assert [int("ant" in path.split("/")) for path in paths] == data.validation.labels.tolist()


def test_validation_does_without_a_class_and_keeps_the_numbers_of_training(tmp_path):
    train = write_folder(tmp_path / "train", per_class=2)
    for name, empty in (("lacks", False), ("has_it_empty", True)):
        validation = write_folder(tmp_path / name, classes=("ant", "cat"), per_class=1)
        if empty:
            (validation / "bee").mkdir()
        data = load(train_dir=str(train), validation_dir=str(validation))
        assert data.class_names == ["ant", "bee", "cat"]
        assert data.validation.labels.tolist() == [0, 2]


def test_a_validation_class_that_training_does_not_know_is_refused_by_name(tmp_path):
    first = write_folder(tmp_path / "a", classes=("ant", "bee"), per_class=1)
    second = write_folder(tmp_path / "b", classes=("ant", "wasp"), per_class=1)
    message = refusal(train_dir=str(first), validation_dir=str(second))
    assert message.startswith(f"{second} has classes that {first} does not have: wasp.")


def test_links_bring_each_image_once_under_its_own_label_and_never_into_both_splits(tmp_path):
    folder = write_folder(tmp_path / "images", per_class=4)
    (folder / "ant" / "up").symlink_to(folder)
    (folder / "cat" / "top").symlink_to(tmp_path)
    (folder / "bee" / "0_again.png").symlink_to(folder / "ant" / "0.png")
    data = load(train_dir=str(folder), validation_share=0.25)
    assert data.class_names == ["ant", "bee", "cat"]
    used = []
    for source in (data.train, data.validation):
        paths = [source.dataset[int(row)]["image"]["path"] for row in source.rows]
        assert [path.split("/")[-2] for path in paths] == [data.class_names[label] for label in source.labels]
        used += [os.path.realpath(path) for path in paths]
    assert len(used) == len(set(used)) == 12
    (note,) = data.notes
    assert note.endswith("3 links to files that are listed elsewhere were left out: ant/up, bee/0_again.png, cat/top")


def test_what_systems_leave_is_no_class_and_what_cannot_be_read_is_counted(tmp_path):
    folder = write_folder(tmp_path / "images", per_class=2)
    for name in ("__MACOSX/._0.png", ".AppleDouble/0.png", "@eaDir/0.png", "bee/._0.png", "bee/Thumbs.db"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not an image")
    for number in range(20):
        (folder / "bee" / f"{number}.xyz").touch()
    (folder / "cover.png").touch()
    data = load(train_dir=str(folder), validation_dir=str(folder))
    assert (data.class_names, data.train.num_images) == (["ant", "bee", "cat"], 6)
    assert data.notes == [
        f"{folder}: 20 files with other endings were left out: .xyz",
        f"{folder}: 1 image outside the folders of the classes was left out",
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_names_that_are_not_utf8_are_trained_on(tmp_path, streaming):
    folder = write_folder(tmp_path / "images", per_class=2)
    (folder / "bee" / "0.png").rename(os.fsdecode(os.fsencode(folder) + b"/bee/\xe9.png"))
    (folder / "ant").rename(os.fsdecode(os.fsencode(folder) + b"/\xc4"))
    data = load(train_dir=str(folder), validation_dir=str(folder), streaming=streaming)
    assert data.class_names == ["bee", "cat", "\\xc4"]
    examples = list(data.train.dataset) if streaming else [data.train.dataset[int(row)] for row in data.train.rows]
    names = [data.train.name(example) for example in examples]
    assert names == [f"{folder}/{name}.png" for name in ("bee/1", "bee/\\xe9", "cat/0", "cat/1", "\\xc4/0", "\\xc4/1")]
    images = [decode_image(read_image(data.train.image(example)))[0] for example in examples]
    assert np.array_equal(images[1], picture(100, (20, 19)))


def test_a_label_that_is_missing_or_unknown_is_refused_with_its_row(tmp_path):
    path = str(write_parquet(tmp_path / "a.parquet", [0, 1, None, 1]))
    assert "train[2] has the label None in the column 'label'" in refusal(train_files=[path])
    path = str(write_parquet(tmp_path / "lists.parquet", [[0, 1], [1, 0]]))
    assert "`label_column='label'` of" in refusal(train_files=[path]) and "not classes" in refusal(train_files=[path])
    path = str(write_parquet(tmp_path / "b.parquet", [0, 1, 2]))
    message = refusal(train_files=[path], class_names=["ant", "bee"])
    assert "train[2] has the label 2" in message and "not one of 0, 1" in message


def test_columns_are_listed_where_the_right_one_is_unclear(tmp_path):
    labels = {"fine": ClassLabel(names=["a", "b"]), "coarse": ClassLabel(names=["c"]), "picture": Image()}
    rows = {"fine": [0, 1], "coarse": [0, 0], "picture": [picture(index) for index in range(2)]}
    Dataset.from_dict(rows, features=Features(labels)).to_parquet(tmp_path / "a.parquet")
    files = {"train_files": [str(tmp_path / "a.parquet")], "validation_share": 0.5}
    listed = "are fine (ClassLabel), coarse (ClassLabel), picture (Image): "
    assert refusal(**files).endswith(f"{listed}`label_column` must name one of them.")
    assert refusal(**files, label_column="label").endswith(f"{listed}`label_column='label'` is not one of them.")
    same = {"validation_files": files["train_files"], "label_column": "fine"}
    assert load(**files, **same).train.labels.tolist() == [0, 1]


def test_a_table_without_images_is_refused(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a"])})
    Dataset.from_dict({"text": ["x"], "label": [0]}, features=features).to_parquet(tmp_path / "a.parquet")
    message = refusal(train_files=[str(tmp_path / "a.parquet")])
    assert "text (Value), label (ClassLabel): `image_column` must name one of them" in message


def test_what_is_missing_empty_or_contradictory_is_said_in_one_line(tmp_path):
    folder = str(write_folder(tmp_path / "images", per_class=2))
    (tmp_path / "images" / "dog").mkdir()
    sound = str(write_folder(tmp_path / "sound", per_class=2))
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "ant").mkdir(parents=True)
    (tmp_path / "broken.parquet").write_text("hello")
    write_tar(tmp_path / "words.tar", ["ant"])
    tar = [str(write_tar(tmp_path / "a.tar", [0, 1]))]
    stream = {"train_files": tar, "streaming": True}
    named = {**stream, "class_names": ["a", "b"]}
    expected = {
        "No data is given: set `dataset_name`, `train_dir` or `train_files`": {},
        "`train_dir='a'` and `dataset_name='digits'`: give only one": {"dataset_name": "digits", "train_dir": "a"},
        "`validation_split='x'` is a split of `dataset_name`": {"train_dir": sound, "validation_split": "x"},
        "nowhere cannot be read: No such file or directory": {"train_dir": str(tmp_path / "nowhere")},
        "empty'` needs one sub-folder of images per class: there is none.": {"train_dir": str(tmp_path / "empty")},
        "images'` has no images of the classes dog: add some, or remove these folders.": {"train_dir": folder},
        "bare'` needs one sub-folder of images per class: there are no images in ant.": {
            "train_dir": sound,
            "validation_dir": str(tmp_path / "bare"),
        },
        "nowhere/*.tar'` matches no file": {"train_files": [*tar, str(tmp_path / "nowhere/*.tar")]},
        "must all end in .parquet, or all in .tar": {"train_files": [*tar, str(tmp_path / "broken.parquet")]},
        "broken.parquet` cannot be loaded: Parquet file size": {"train_files": [str(tmp_path / "broken.parquet")]},
        "words.tar` cannot be loaded: invalid literal for int": {"train_files": [str(tmp_path / "words.tar")]},
        "cannot be loaded: Couldn't reach 'nobody/nothing'": {"dataset_name": "nobody/nothing"},
        "`validation_share=1.5` must be between 0 and 1": {"train_dir": sound, "validation_share": 1.5},
        "`validation_share=0.9` cannot be taken from each class": {"train_dir": sound, "validation_share": 0.9},
        "`on_bad_image='ignore'` must be skip or fail": {"train_dir": sound, "on_bad_image": "ignore"},
        "`max_train_images=0` must be at least 1": {"train_dir": sound, "max_train_images": 0},
        "`num_train_images=5` is for `streaming`": {"train_dir": sound, "num_train_images": 5},
        "`class_names` has 1 names, but the data has 3 classes": {"train_dir": sound, "class_names": ["a"]},
        "`class_names` is required": stream,
        "set `validation_dir`, `validation_files` or `validation_split`": named,
        "`num_train_images` is required": {**named, "validation_files": tar},
    }
    for message, arguments in expected.items():
        assert message in refusal(**arguments)


def test_the_length_of_a_stream_is_known_given_or_limited(tmp_path):
    tar = [str(write_tar(tmp_path / "a.tar", [0, 1] * 5))]
    options = {"train_files": tar, "validation_files": tar, "streaming": True, "class_names": ["a", "b"]}
    assert load(**options, num_train_images=10).describe()["num_validation_images"] is None
    limited = load(**options, max_train_images=4, max_validation_images=3)
    assert (limited.train.num_images, limited.validation.num_images) == (4, 3)
    assert len(list(limited.train.dataset)) == 4
    assert load(**options, num_train_images=10, max_train_images=4).train.num_images == 4


def test_a_parquet_stream_has_a_shard_for_each_row_group(tmp_path):
    path = str(write_parquet(tmp_path / "a.parquet", ["a", "b"] * 6, row_group_size=4))
    options = {"train_files": [path], "validation_files": [path], "class_names": ["a", "b"]}
    expected = 3 if hasattr(IterableDataset, "reshard") else 1
    assert load(**options, streaming=True).train.dataset.num_shards == expected


def test_the_labels_of_a_table_are_plain_class_numbers():
    data = load(dataset_name="digits")
    assert data.train.labels.dtype == np.int64
    assert Counter(data.train.labels.tolist()).keys() == set(range(10))
