"""Examples from local folders, the Hub's local cache and the built-in data."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
import pytest

from grpocem_jax import tasks
from grpocem_jax.tasks import rows
from grpocem_jax.tasks.sources import Loaded, SourceConfig, load_examples
from grpocem_jax.utils.errors import InputError

LABELS = ("negative", "positive")
REVIEWS = [{"text": f"film {i} was fine", "label": i % 2} for i in range(10)]


def write(folder: Path, **files: Any) -> str:
    """Writes files named SPLIT__EXTENSION, rows as JSON lines, and returns the folder."""
    for name, content in files.items():
        text = content if isinstance(content, str) else "\n".join(map(json.dumps, content)) + "\n"
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return str(folder)


def count_words(prompt: str) -> int:
    return len(prompt.split())


def load(
    task: str, source: SourceConfig, split: Literal["train", "heldout"] = "train", **changes: Any
) -> Loaded:
    options: dict[str, Any] = {
        "max_prompt_tokens": 50,
        "max_samples": 100,
        "seed": 0,
        "count_tokens": count_words,
    }
    return load_examples(tasks.TASKS[task], source, split=split, **(options | changes))


def sentiment(folder: str, **changes) -> SourceConfig:
    return SourceConfig(folder, **({"label_names": LABELS} | changes))


def assert_refused(action, *fragments: str) -> None:
    """One sentence that holds every fragment."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments), message
    assert message.endswith(".")
    assert "\n" not in message
    assert not re.search(r"[.!?] +[A-Z]", message), message


# Reading files


def test_json_lines_become_prompts_and_columns(tmp_path):
    folder = write(tmp_path, train__jsonl='{"text": " Fine {film}. ", "label": 1}\n\n')
    (example,) = load("sentiment", sentiment(folder)).examples
    assert example.prompt == "Review: Fine {film}.\nSentiment:"
    assert example.columns == {"text": "Fine {film}.", "label": "positive", "labels": LABELS}


def test_every_format_gives_the_same_examples(tmp_path):
    made = {}
    for suffix in ("jsonl", "json", "parquet"):
        folder = tmp_path / suffix
        folder.mkdir()
        if suffix == "parquet":
            table = pyarrow.Table.from_pylist(REVIEWS)
            pyarrow.parquet.write_table(table.slice(0, 6), folder / "train-00000-of-00002.parquet")
            pyarrow.parquet.write_table(table.slice(6), folder / "train-00001-of-00002.parquet")
        else:
            write(folder, **{f"train__{suffix}": REVIEWS})
        made[suffix] = load("sentiment", sentiment(str(folder))).examples
    assert len(made["jsonl"]) == 10
    assert made["jsonl"] == made["json"] == made["parquet"]


def test_txt_holds_a_paragraph_a_line_without_blank_lines_and_headings(tmp_path):
    lines = " \n = Lobster = \n \n = = Life = = \n The lobster is 5 = 5 . \n\n It swims . \n"
    loaded = load("general", SourceConfig(write(tmp_path, train__txt=lines)))
    assert sorted(example.prompt for example in loaded.examples) == [
        "It swims .",
        "The lobster is 5 = 5 .",
    ]


def test_free_text_is_cut_after_prompt_words(tmp_path):
    folder = write(tmp_path, train__jsonl=[{"text": "one two\nthree four"}, {"text": "one"}])
    loaded = load("general", SourceConfig(folder, prompt_words=3))
    assert sorted(example.prompt for example in loaded.examples) == ["one", "one two\nthree"]
    assert loaded.shortened == 0  # the cut is the task's, not the token limit's


def test_columns_are_renamed_and_found_inside_others(tmp_path):
    row: dict[str, Any] = {
        "passage": "Ann has cats.",
        "q": "Who?",
        "gold": {"text": ["Ann", "Ms Ann"]},
    }
    columns = {"context": "passage", "question": "q", "answers": "gold.text"}
    source = SourceConfig(write(tmp_path, train__jsonl=[row]), columns=columns)
    (example,) = load("qa", source).examples
    assert example.columns["answers"] == ["Ann", "Ms Ann"]
    row["gold"] = [{"text": "Ann"}, {"text": "Ms Ann"}]  # the other usual nesting
    write(tmp_path, train__jsonl=[row])
    assert load("qa", source).examples == (example,)


def test_a_single_reference_becomes_a_list(tmp_path):
    folder = write(tmp_path, train__jsonl=[{"document": "It rained.", "summary": "Rain."}])
    assert load("summarization", SourceConfig(folder)).examples[0].columns["summary"] == ["Rain."]


def test_subset_is_a_folder_inside_the_source(tmp_path):
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain", train__jsonl=REVIEWS)
    assert len(load("sentiment", sentiment(str(tmp_path), subset="plain")).examples) == 10


@pytest.mark.parametrize("present", ["test", "validation", "valid"])
def test_the_held_out_split_is_found_where_it_is_left_open(tmp_path, present):
    folder = write(tmp_path, **{f"{present}__jsonl": REVIEWS[:2], "train__jsonl": REVIEWS})
    assert len(load("sentiment", sentiment(folder), "heldout").examples) == 2


def test_a_named_held_out_split_is_not_replaced(tmp_path):
    folder = write(tmp_path, train__jsonl=REVIEWS, valid__jsonl=REVIEWS)
    source = sentiment(folder, heldout_split="test")
    assert_refused(lambda: load("sentiment", source, "heldout"), "split test", "test.jsonl")


# Drawing and fitting


def test_the_draw_is_the_same_every_time_and_differs_by_seed(tmp_path):
    folder = write(tmp_path, train__jsonl=REVIEWS)
    draws = [load("sentiment", sentiment(folder), max_samples=5, seed=s) for s in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0].examples != draws[2].examples
    everything = load("sentiment", sentiment(folder))
    assert draws[0].examples == everything.examples[:5]
    expected = Counter(f"Review: {row['text']}\nSentiment:" for row in REVIEWS)
    assert Counter(example.prompt for example in everything.examples) == expected
    first_rows = [f"Review: {row['text']}\nSentiment:" for row in REVIEWS[:5]]
    assert [example.prompt for example in draws[0].examples] != first_rows


def test_a_long_text_loses_its_last_words_and_is_counted(tmp_path):
    rows = [{"text": "one two  three four", "label": 0}, {"text": "one", "label": 0}]
    source = sentiment(write(tmp_path, train__jsonl=rows))
    # "Review:" and "Sentiment:" leave 3 of 5 tokens for words.
    loaded = load("sentiment", source, max_prompt_tokens=5)
    assert {example.columns["text"] for example in loaded.examples} == {"one two  three", "one"}
    assert max(count_words(example.prompt) for example in loaded.examples) == 5
    assert (loaded.shortened, loaded.dropped) == (1, 0)
    assert "1 shortened" in loaded.description


def test_shortening_keeps_as_many_words_as_fit(tmp_path):
    text = "a bb ccc dddd eeeee ffffff"
    source = sentiment(write(tmp_path, train__jsonl=[{"text": text, "label": 0}]))
    frame = len("Review: \nSentiment:")
    for limit in range(20, 60):
        loaded = load("sentiment", source, max_prompt_tokens=limit, count_tokens=len)
        words = loaded.examples[0].columns["text"].split()
        kept = " ".join(words)
        assert text.startswith(kept)
        assert frame + len(kept) <= limit
        if len(words) < 6:
            # The next word would not fit.
            assert frame + len(kept) + 1 + len(words) + 1 > limit


def test_prompts_of_the_other_split_are_left_out(tmp_path):
    folder = write(tmp_path, train__jsonl=REVIEWS, test__jsonl=REVIEWS[:2])
    heldout = load("sentiment", sentiment(folder), "heldout").examples
    exclude = {example.prompt for example in heldout}
    train = load("sentiment", sentiment(folder), exclude=exclude)
    assert len(train.examples) == 8
    assert not exclude & {example.prompt for example in train.examples}
    assert "2 in the other split and left out" in train.description
    heldout = load("sentiment", sentiment(write(tmp_path, test__jsonl=REVIEWS)), "heldout")
    exclude = {example.prompt for example in heldout.examples}
    with pytest.raises(InputError, match=r"not in the other split too \(10 are\): give the splits"):
        load("sentiment", sentiment(folder), exclude=exclude)


def test_a_long_passage_is_dropped_because_the_answer_may_go_with_it(tmp_path):
    rows = [
        {"context": "word " * n, "question": "Who?", "answers": ["Ann"]} for n in (1, 2, 40, 3, 60)
    ]
    loaded = load("qa", SourceConfig(write(tmp_path, train__jsonl=rows)), max_prompt_tokens=20)
    assert (len(loaded.examples), loaded.shortened, loaded.dropped) == (3, 0, 2)
    assert "3 train examples of 5 rows, 2 too long and dropped" in loaded.description
    # Rows that are dropped do not count against max_samples.
    source = SourceConfig(write(tmp_path, train__jsonl=rows))
    assert len(load("qa", source, max_prompt_tokens=20, max_samples=3).examples) == 3


def test_tables_of_text_give_the_same_examples_as_json_lines(tmp_path):
    rows = [
        {"text": 'She said "no", twice', "label": 0},
        {"text": "two lines,\nin one cell", "label": 1},
        {"text": "žluťoučký kůň\tpěl", "label": 1},
    ]
    made = {}
    for suffix, separator in (("jsonl", None), ("csv", ","), ("tsv", "\t")):
        folder = tmp_path / suffix
        folder.mkdir()
        if separator is None:
            write(folder, train__jsonl=rows)
        else:
            quoted = ['"' + row["text"].replace('"', '""') + '"' for row in rows]
            cells = zip(quoted, rows, strict=True)
            lines = [f"{text}{separator}{row['label']}" for text, row in cells]
            content = "\ufeff" + "\r\n".join([f"text{separator}label", *lines, ""])
            (folder / f"train.{suffix}").write_bytes(content.encode())
        made[suffix] = load("sentiment", sentiment(str(folder))).examples
    assert len(made["jsonl"]) == 3
    assert made["jsonl"] == made["csv"] == made["tsv"]


def test_the_values_of_a_table_of_text_are_strings(tmp_path):
    write(tmp_path, train__csv="prompt,answer,note\nOne?,007,\n")
    (row,) = rows.local_rows(tmp_path, "train", field="f").rows
    assert row.read() == {"prompt": "One?", "answer": "007", "note": ""}


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        (b"a,b,c", "line 3 has 3 cells for 2 columns"),
        (b"alone", "line 3 has 1 cells for 2 columns"),
        (b'"a"b,1', "line 3 cannot be read"),
        (b"\xff,1", "line 3 is not UTF-8 text"),
        (b"a\0b,1", "line 3 has a NUL byte"),
        (b"fine,3", "line 3 has the label '3'"),
    ],
)
def test_a_bad_line_of_a_table_is_named_or_counted(tmp_path, line, fragment):
    content = b"\n".join([b"text,label", b'"fine, film",1', line, b"", b"good,0", b""])
    (tmp_path / "train.csv").write_bytes(content)
    source = sentiment(str(tmp_path))
    assert_refused(lambda: load("sentiment", source), "train.csv", fragment, "data.bad_lines")
    loaded = load("sentiment", source, bad_lines="skip")
    assert sorted(example.columns["text"] for example in loaded.examples) == ["fine, film", "good"]
    assert loaded.bad_lines == 1


def test_a_table_of_text_has_cells_of_any_length_and_needs_names(tmp_path):
    write(tmp_path, train__csv=f"text,label\n{'long ' * 50_000},1\n")
    (row,) = rows.local_rows(tmp_path, "train", field="f").rows
    assert len(row.read()["text"]) == 250_000
    for header in ("text,text", "text,", '"text'):
        write(tmp_path, train__csv=f"{header}\na,0\n")
        assert_refused(lambda: load("sentiment", sentiment(str(tmp_path))), "train.csv")
    write(tmp_path, train__csv="text,label\n")
    assert_refused(lambda: load("sentiment", sentiment(str(tmp_path))), "train.csv", "empty")


@pytest.mark.parametrize("indent", [None, 3])
def test_a_json_array_gives_the_same_examples_as_json_lines(tmp_path, indent):
    lines, array = tmp_path / "lines", tmp_path / "array"
    lines.mkdir()
    array.mkdir()
    write(lines, train__json=REVIEWS)
    write(array, train__json="\ufeff\n" + json.dumps(REVIEWS, indent=indent))
    found, wanted = (load("sentiment", sentiment(str(x))).examples for x in (array, lines))
    assert len(found) == 10
    assert found == wanted


def test_elements_of_an_array_that_are_no_rows_are_named_or_counted(tmp_path):
    write(tmp_path, train__json=json.dumps([REVIEWS[0], 3, {"text": "\ud800"}, REVIEWS[1]]))
    source = sentiment(str(tmp_path))
    said = ("train.json, element 2 holds a int", "such lines (2 of them)")
    assert_refused(lambda: load("sentiment", source), *said)
    assert len(load("sentiment", source, bad_lines="skip").examples) == 2
    for content in ("[{]", '[{"text": "a", "label": 0}', "[]", "[" * 100_000):
        write(tmp_path, train__json=content)
        assert_refused(lambda: load("sentiment", source, bad_lines="skip"), "train.json")


def names(folder):
    """The files that a split is read from, by what their rows say."""
    return sorted({row.read()["from"] for row in rows.local_rows(folder, "train", field="f").rows})


@pytest.mark.parametrize(
    ("files", "read"),
    [
        (["train", "train-2", "train-old", "train-00000-of-00001", "trainer"], ["train"]),
        (["train-00000-of-00002", "train-00001-of-00002", "train-2024-old", "train-x-of-y"],
         ["train-00000-of-00002", "train-00001-of-00002"]),
        (["train-0", "train-1", "train-10", "train-1b", "train-1-2"],
         ["train-0", "train-1", "train-10"]),
    ],
)  # fmt: skip
def test_a_split_is_its_file_alone_or_its_numbered_shards(tmp_path, files, read):
    for name in files:
        write(tmp_path, **{f"{name}__jsonl": [{"from": name}]})
    assert names(tmp_path) == sorted(read)


@pytest.mark.parametrize(
    ("files", "fragments"),
    [
        (["train-00000-of-00003", "train-00002-of-00003"], ["shard train-00001-of-00003"]),
        (["train-0-of-1", "train-0-of-2", "train-1-of-2"], ["several sets"]),
        (["train-0", "train-0-of-1"], ["several sets"]),
        (["train-2024-old"], ["no file of the split train", "train-2024-old.jsonl cannot"]),
        (["train-0-of-9999999999"], ["shard train-0000000001-of-9999999999"]),
    ],
)
def test_shards_that_are_not_whole_are_refused(tmp_path, files, fragments):
    for name in files:
        write(tmp_path, **{f"{name}__jsonl": [{"from": name}]})
    assert_refused(lambda: names(tmp_path), *fragments)


def test_columns_may_differ_by_split_and_by_row(tmp_path):
    train = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2, "hint": "x"}]
    folder = write(tmp_path, train__jsonl=train, test__csv="prompt,source\nc,web\n")
    mine = tasks.Task("mine", {"prompt": "the prompt"}, "{prompt}", (), own=True)
    options = {"count_tokens": len, "max_prompt_tokens": 9, "max_samples": 9, "seed": 0}
    source = SourceConfig(folder)
    found = load_examples(mine, source, split="train", **options).examples
    assert sorted(found) == [tasks.Example("a", train[0]), tasks.Example("b", train[1])]
    (judged,) = load_examples(mine, source, split="heldout", **options).examples
    assert judged.columns == {"prompt": "c", "source": "web"}


@pytest.mark.parametrize("values", [["0", "1"], [" 1", "0 "], [1.0, 0.0]])
def test_integer_labels_may_be_digits_or_whole_floats(tmp_path, values):
    given = [{"text": f"film {value}", "label": value} for value in values]
    loaded = load("sentiment", sentiment(write(tmp_path, train__jsonl=given)))
    assert {example.columns["text"]: example.columns["label"] for example in loaded.examples} == {
        f"film {value}".strip(): LABELS[int(value)] for value in values
    }


@pytest.mark.parametrize("hidden", [-1, "-1", -1.0])
def test_labels_that_are_not_published_name_the_splits_that_are_there(tmp_path, hidden):
    rows = [{"text": f"film {i}", "label": hidden} for i in range(3)]
    folder = write(tmp_path, train__jsonl=REVIEWS, test__jsonl=rows, validation__jsonl=REVIEWS)
    source = sentiment(folder)
    said = ("label -1", "set data.sentiment.heldout_split to 'train' or 'validation'")
    assert_refused(lambda: load("sentiment", source, "heldout"), said[1], "label_names")
    other = dataclasses.replace(source, train_split="test", heldout_split="train")
    assert_refused(lambda: load("sentiment", other), "set data.sentiment.train_split to 'train' or")
    named = dataclasses.replace(source, heldout_split="validation")
    assert len(load("sentiment", named, "heldout").examples) == 10


def test_a_data_set_of_other_columns_names_the_missing_one_before_the_labels(tmp_path):
    folder = write(tmp_path, train__jsonl=[{"question": "2 + 2?", "answer": "4"}])
    source = sentiment(folder, label_names=())
    said = ("data.sentiment.columns.text", "'text', a column that", "'question', 'answer'")
    assert_refused(lambda: load("sentiment", source), *said)


# Errors


def test_files_that_cannot_be_read_are_named(tmp_path):
    source = sentiment(str(tmp_path))

    def run():
        return load("sentiment", source)

    assert_refused(
        lambda: load("sentiment", sentiment("./nowhere/at/all")),
        "data.sentiment.source",
        "nowhere/at/all",
        "no folder",
    )
    assert_refused(run, "data.sentiment.source", str(tmp_path), "train.jsonl")
    write(tmp_path, train__jsonl="\n \n")
    assert_refused(run, "train.jsonl", "empty")
    write(tmp_path, train__jsonl='{"text": "x", "label": 0}\n{"text": "x"\n')
    assert_refused(run, "train.jsonl, line 2", "not valid JSON")
    write(tmp_path, train__jsonl='\n["text"]\n')
    assert_refused(run, "train.jsonl, line 2", "a list")
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "\xff"}\n')
    assert_refused(run, "train.jsonl", "UTF-8")
    write(tmp_path, train__parquet="no table")
    assert_refused(run, "train.jsonl", "train.parquet", "several formats")
    (tmp_path / "train.jsonl").unlink()
    assert_refused(run, "train.parquet", "not a readable parquet file")


GOOD = b'{"text": "fine film", "label": 1}'
BAD_LINES = [
    (b"{", "is not valid JSON"),
    (b'{"text": "x", "label": 0}}', "is not valid JSON"),
    (b"[" * 100_000, "is not valid JSON"),
    (b'{"label": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    (b'{"text": "\x01"}', "is not valid JSON"),
    (b"text", "is not valid JSON"),
    (b"[1]", "holds a list instead of an object"),
    (b'"text"', "holds a str instead of an object"),
    (b"null", "holds null instead of an object"),
    (b"3", "holds a int instead of an object"),
    (b'{"text": "\xff", "label": 0}', "is not UTF-8 text (byte 10)"),
    (b"\xfe\xff\x00{", "is not UTF-8 text"),
    (b'{"text": "a\0b", "label": 0}', "has a NUL byte"),
    (b"\0\0\0", "has a NUL byte"),
    (b'{"text": "\\ud83d", "label": 0}', "has half of a surrogate pair"),
    (b'{"text": "x", "label": 0, "more": {"\\udc00": 1}}', "has half of a surrogate pair"),
    (b'{"text": "x"}', "'label', a column that"),
    (b'{"label": 0}', "'text', a column that"),
    (b"{}", "'text', a column that"),
    (b'{"text": 3, "label": 0}', "has 3 in column 'text'"),
    (b'{"text": null, "label": 0}', "has None in column 'text'"),
    (b'{"text": ["x"], "label": 0}', "has ['x'] in column 'text'"),
    (b'{"text": " ", "label": 0}', "has no text in column 'text'"),
    (b'{"text": "x", "label": 2}', "has the label 2"),
    (b'{"text": "x", "label": "bad"}', "has the label 'bad'"),
    (b'{"text": "x", "label": NaN}', "has the label nan"),
]


@pytest.mark.parametrize(("line", "fragment"), BAD_LINES)
def test_a_bad_line_is_named_with_the_setting_or_counted_and_passed_over(tmp_path, line, fragment):
    (tmp_path / "train.jsonl").write_bytes(b"\n".join([GOOD, line, b" ", line, GOOD]))
    source = sentiment(str(tmp_path))
    option = "set data.bad_lines='skip'"
    assert_refused(lambda: load("sentiment", source), "train.jsonl, line", fragment, option)
    loaded = load("sentiment", source, bad_lines="skip")
    assert loaded.bad_lines == 2
    assert [example.columns["text"] for example in loaded.examples] == 2 * ["fine film"]
    said = "2 train examples of 4 rows, 1 blank or a heading, 2 bad and passed over (the first: "
    assert said in loaded.description
    assert fragment in loaded.description
    assert loaded.description.count("train.jsonl, line") == 1


def test_lines_that_cannot_be_read_are_counted_in_all_files_of_a_split(tmp_path):
    for number in range(3):
        (tmp_path / f"train-{number}.jsonl").write_bytes(GOOD + b"\n[]\n{\n")
    source = sentiment(str(tmp_path))
    said = ("train-0.jsonl, line 2 holds a list", "to count such lines (6 of them)")
    assert_refused(lambda: load("sentiment", source), *said)
    assert load("sentiment", source, bad_lines="skip").bad_lines == 6


def test_rows_of_every_format_are_passed_over(tmp_path):
    rows = [{"text": "fine", "label": 0}, {"text": None, "label": 0}, {"text": "x", "label": 9}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    broken = pyarrow.array([b"It swims.", b"\xff", b"\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "valid.parquet")
    (tmp_path / "test.txt").write_bytes(b"\xef\xbb\xbfIt swims.\r\n\xff\r\n\r\na\0\r\n = T = \n")
    loaded = load("sentiment", sentiment(str(tmp_path)), bad_lines="skip")
    assert (len(loaded.examples), loaded.bad_lines) == (1, 2)
    for split in ("test", "valid"):
        source = SourceConfig(str(tmp_path), train_split=split)
        assert_refused(lambda s=source: load("general", s), split, "or set data.bad_lines='skip'")
        loaded = load("general", source, bad_lines="skip")
        assert [example.prompt for example in loaded.examples] == ["It swims."]
        assert loaded.bad_lines == 2


def test_data_of_which_no_line_can_be_used_are_refused_with_the_first(tmp_path):
    source = sentiment(write(tmp_path, train__jsonl='{"text": "x"}\n[]\n'))
    assert_refused(
        lambda: load("sentiment", source, bad_lines="skip"),
        "2 of 2 rows cannot be used",
        "train.jsonl, line 2 holds a list",
    )


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        ({"review": "x", "label": 0}, ("columns.text", "line 1", "'review', 'label'")),
        ({"text": " ", "label": 0}, ("line 1", "no text", "'text'")),
        ({"text": None, "label": 0}, ("line 1", "None", "'text'", "string")),
        ({"text": "x", "label": 2}, ("line 1", "label 2", "label_names", "positive")),
        ({"text": "x", "label": -1}, ("line 1", "label -1", "label_names")),
        ({"text": "x", "label": "bad"}, ("line 1", "label 'bad'", "label_names")),
        ({"text": "x", "label": 0.5}, ("line 1", "label 0.5", "neither an integer nor a string")),
        ({"text": "x", "label": True}, ("line 1", "label True", "neither")),
        ({"text": "x", "label": None}, ("line 1", "label None", "neither")),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, row, fragments):
    source = sentiment(write(tmp_path, train__jsonl=[row]))
    assert_refused(lambda: load("sentiment", source), "train.jsonl", *fragments)


@pytest.mark.parametrize("answers", [[], [""], "", [3], None, {"text": ["x"]}])
def test_references_must_be_text(tmp_path, answers):
    row = {"context": "x", "question": "x", "answers": answers}
    source = SourceConfig(write(tmp_path, train__jsonl=[row]))
    assert_refused(lambda: load("qa", source), "line 1", "'answers'")


def test_a_nested_column_that_is_missing_is_named_in_full(tmp_path):
    row = {"context": "x", "question": "x", "answers": {"start": [0]}}
    columns = {"answers": "answers.text"}
    source = SourceConfig(write(tmp_path, train__jsonl=[row]), columns=columns)
    assert_refused(
        lambda: load("qa", source), "data.qa.columns.answers", "'answers.text'", "'question'"
    )


def test_configs_that_cannot_work_are_refused(tmp_path):
    folder = write(tmp_path, train__jsonl=REVIEWS, test__jsonl=REVIEWS)

    def refuse(source, *fragments, **options):
        assert_refused(lambda: load("sentiment", source, **options), *fragments)

    refuse(sentiment(folder, label_names=()), "data.sentiment.label_names", "empty")
    for names in (("a", "a"), ("a", " ")):
        refuse(sentiment(folder, label_names=names), "data.sentiment.label_names", repr(names))
    for name in ("", "~nobody/data", "/" + "z" * 5000, "./a\0b"):
        refuse(sentiment(name), "data.sentiment.source")
    refuse(sentiment(folder, heldout_split="train"), "heldout_split", "'train'")
    refuse(sentiment(folder, columns={"txt": "text"}), "data.sentiment.columns", "'txt'", "label")
    refuse(sentiment(folder, prompt_words=0), "prompt_words", "0")
    refuse(sentiment(folder), "data.max_samples", "0", max_samples=0)
    refuse(sentiment(folder), "data.max_prompt_tokens", "sentiment", "1", max_prompt_tokens=1)


def test_nothing_left_is_an_error_that_names_the_limit(tmp_path):
    row = {"context": "word " * 40, "question": "Who?", "answers": ["Ann"]}
    source = SourceConfig(write(tmp_path, train__jsonl=[row, row]))
    assert_refused(
        lambda: load("qa", source, max_prompt_tokens=9),
        "task qa",
        "data.max_prompt_tokens=9",
        "2 are longer",
    )
    rows = [row, {**row, "context": "word " * 31}]
    source = SourceConfig(write(tmp_path, train__jsonl=rows))
    with pytest.raises(InputError) as error:
        load("qa", source, max_prompt_tokens=9)
    enough = re.search(r"raise it to (\d+) or more\.$", str(error.value))
    assert enough is not None
    assert len(load("qa", source, max_prompt_tokens=int(enough[1])).examples) == 1
    with pytest.raises(InputError, match="2 are longer"):
        load("qa", source, max_prompt_tokens=int(enough[1]) - 1)
    headings = SourceConfig(write(tmp_path, valid__txt=" = Title = \n"), train_split="valid")
    assert_refused(lambda: load("general", headings), "data.general.source", "train", "nothing")


# The Hub


HUB = """
import json, os, shutil, sys
from datasets.packaged_modules.parquet.parquet import Parquet
from grpocem_jax import tasks
from grpocem_jax.utils.errors import InputError

def build(repo, subset, path, *splits):
    # The builder that load_dataset runs for a Hub data set of parquet files; what it has prepared
    # is moved to where the cache keeps that data set.
    name = repo.split("/")[1]
    builder = Parquet(cache_dir=f"{folder}/build", dataset_name=name, config_name=subset,
                      hash="0" * 16, data_files=dict.fromkeys(splits, path))
    builder.download_and_prepare()
    kept = f"{os.environ['HF_HOME']}/datasets/{repo.replace('/', '___')}/{subset}/0.0.0"
    os.makedirs(kept)
    shutil.move(builder.cache_dir, kept)

folder = sys.argv[1]
build("owner/questions", "plain_text", f"{folder}/qa.parquet", "train", "validation")
build("owner/reviews", "default", f"{folder}/reviews.parquet", "train", "test")

def load(task, split="train", **source):
    try:
        loaded = tasks.load_examples(
            tasks.TASKS[task], tasks.SourceConfig(**source), split=split, count_tokens=len,
            max_prompt_tokens=500, max_samples=3, seed=0)
        return [loaded.description, [[e.prompt, e.columns] for e in loaded.examples]]
    except InputError as error:
        return str(error)

answers = {"answers": "answers.text"}
print(json.dumps({
    "qa": load("qa", source="owner/questions", subset="plain_text", columns=answers),
    "qa heldout": load("qa", "heldout", source="owner/questions", columns=answers),
    "sliced": load("sentiment", source="owner/reviews", train_split="train[:2]"),
    "sentiment": load("sentiment", source="owner/reviews"),
    "no split": load("sentiment", source="owner/reviews", train_split="dev"),
    "no subset": load("qa", source="owner/questions", subset="other"),
    "not cached": load("qa", source="owner/unknown", subset="x"),
}))
"""


def run_hub(folder: Path, **environment: str) -> dict:
    """Loads from a cache built for the occasion, in a process that reads its settings anew."""
    import datasets

    qa = {
        "context": ["Ann has cats.", "Bob has dogs."],
        "question": ["Who has cats?", "Who has dogs?"],
        "answers": [{"text": [name], "answer_start": [0]} for name in ("Ann", "Bob")],
    }
    datasets.Dataset.from_dict(qa).to_parquet(folder / "qa.parquet")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABELS))}
    )
    reviews = {"text": ["bad", "good", "fine"], "label": [0, 1, 1]}
    datasets.Dataset.from_dict(reviews, features).to_parquet(folder / "reviews.parquet")
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(folder)],
        env=os.environ | {"HF_HOME": str(folder / "home"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "environment",
    [
        {"HF_HUB_OFFLINE": "1"},
        {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"},  # nothing answers there
    ],
    ids=["offline", "no network"],
)
def test_a_hub_data_set_loads_from_the_cache_or_says_there_is_no_network(tmp_path, environment):
    made = run_hub(tmp_path, **environment)
    description, examples = made["qa"]
    assert description == "qa: owner/questions, 2 train examples of 2 rows"
    assert sorted(columns["answers"] for _, columns in examples) == [["Ann"], ["Bob"]]
    assert "Ann has cats.\nQuestion: Who has cats?\nAnswer:" in [prompt for prompt, _ in examples]
    assert made["qa heldout"][0].startswith("qa: owner/questions, 2 heldout")
    assert len(made["sliced"][1]) == 2
    assert Counter(columns["label"] for _, columns in made["sentiment"][1]) == {
        "positive": 2,
        "negative": 1,
    }
    assert made["sentiment"][1][0][1]["labels"] == list(LABELS)  # the data set's own names
    assert all(fragment in made["no split"] for fragment in ("owner/reviews", "dev", "train"))
    assert all(fragment in made["no subset"] for fragment in ("owner/questions", "other"))
    for fragment in (
        "data.qa.source is 'owner/unknown'",
        "no network",
        "local folder in data.qa.source",
        "--config tiny",
    ):
        assert fragment in made["not cached"]
    for name in ("no split", "no subset", "not cached"):
        assert isinstance(made[name], str)
        assert "\n" not in made[name]


def test_splits_of_other_columns_load_one_by_one(tmp_path):
    """As of the Hub, whose data sets are read by the same builders as a folder."""
    data = tmp_path / "data"
    data.mkdir()
    write(data, train__csv="prompt;answer\na;1\nb;2\n", test__csv="prompt;source;more\nc;web;0\n")
    (data / "README.md").write_text("---\nconfigs:\n- config_name: default\n  sep: ;\n---\n")
    code = (
        "import json, sys; from grpocem_jax.tasks.rows import hub_rows;"
        "print(json.dumps([[row.read() for row in hub_rows(sys.argv[1], '', split, '', field='f')"
        ".rows] for split in ('train', '', 'test', 'train[1:]')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(data)],
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    train = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]
    test = [{"prompt": "c", "source": "web", "more": 0}]
    assert json.loads(done.stdout.splitlines()[-1]) == [train, test, test, train[1:]]


# Real data, and the built-in


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = {
    "qa": SourceConfig("squad"),
    "sentiment": SourceConfig("sst2_sentences", columns={"text": "sentence"}, label_names=LABELS),
    "summarization": SourceConfig("scitldr_a", columns={"document": "source", "summary": "target"}),
    "classification": SourceConfig(
        "ag_news", label_names=("World", "Sports", "Business", "Sci/Tech")
    ),
    "general": SourceConfig("wikitext2", train_split="valid", heldout_split="test"),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real slices lie beside the repository")
@pytest.mark.parametrize("name", REAL)
def test_real_data_make_examples_whose_references_earn_full_reward(name):
    task = tasks.TASKS[name]
    source = dataclasses.replace(REAL[name], source=str(SHARED / REAL[name].source))
    heldout: set[str] = set()
    splits: tuple[Literal["heldout", "train"], ...] = ("heldout", "train")
    for split in splits:
        loaded = load(name, source, split, max_prompt_tokens=150, max_samples=200, exclude=heldout)
        prompts = [example.prompt for example in loaded.examples]
        assert len(prompts) == 200
        assert max(map(count_words, prompts)) <= 150
        assert not heldout & set(prompts)
        heldout = heldout or set(prompts)
        if task.is_free_text:
            assert max(map(count_words, prompts)) == source.prompt_words
            assert not any(prompt.startswith("=") for prompt in prompts)
            continue
        columns = {
            column: [example.columns[column] for example in loaded.examples]
            for column in loaded.examples[0].columns
        }
        references = columns[next(c for c in task.columns if c not in task.text_columns)]
        completions = [given if isinstance(given, str) else given[0] for given in references]
        assert task.rewards[0].function(prompts, completions, **columns) == pytest.approx(
            [1.0] * 200
        )


@pytest.mark.parametrize("name", REAL)
def test_built_in_data_make_examples(name):
    loaded = load(name, SourceConfig(), max_prompt_tokens=200, max_samples=500)
    assert len(loaded.examples) == 500
    assert loaded.description.startswith(f"{name}: builtin, 500 train examples")
